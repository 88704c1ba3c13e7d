"""What one conversion trains: the output itself and, to compare, its two neighbours on the same steps and batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padconvert.errors import FileError, UsageError
from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.examples import Batch, Examples, known_labels, tensors_of
from padconvert.finetune.data.labels import check_labels
from padconvert.finetune.data.sources import Data
from padconvert.finetune.evaluate import Judged, judge
from padconvert.finetune.loop import Setting, finetune_, routing_forwards, start
from padconvert.finetune.objectives import Objective, class_axis, dtype_of, forward, logits_of
from padconvert.finetune.phases import Phases
from padconvert.finetune.resume import WorkDir
from padconvert.finetune.routing import set_routers_
from padconvert.layers.pad import PadLayer
from padconvert.partition import Partitioner
from padconvert.partition.scores import Need, score_named
from padconvert.policy import Policy
from padconvert.progress import Progress


@dataclass(frozen=True, slots=True)
class Trainer:
    """Data, objective and policy of a run, bound together. `teacher` is the source, frozen and in eval mode."""

    policy: Policy
    data: Data
    setting: Setting
    progress: Progress
    work_dir: WorkDir | None

    @staticmethod
    def of(
        policy: Policy,
        data: Data,
        source: nn.Module,
        seed: int,
        device: torch.device,
        progress: Progress,
        work_dir: WorkDir | None,
    ) -> Trainer:
        """Raises FileError where the data does not fit the model, PolicyError where it does not fit the policy."""
        objective = objective_of(policy, data)
        teacher = copy.deepcopy(source).eval().requires_grad_(False) if objective.needs_teacher else None
        batches = Batches(data.train, policy.train.batch_size, seed)
        check_data(source, data, device)
        return Trainer(policy, data, Setting(policy, objective, teacher, batches, seed, device), progress, work_dir)

    def set_routers_(self, model: nn.Module, layers: Mapping[str, PadLayer]) -> None:
        """Set the routers from what the layers see of the training data."""
        forwards = routing_forwards(model, self.setting.batches, self.setting.device)
        set_routers_(model, layers, forwards, self.setting.seed, self.policy.train.top_probability)

    def fit_(self, model: nn.Module, partitioner: Partitioner | None, name: str) -> list[dict[str, float]]:
        """Train `model` in place, resuming from the work directory if there is one; returns the run's history."""
        keeper = self.work_dir.keeper(name, self.policy.train) if self.work_dir is not None else None
        run = start(model, partitioner, self.setting)
        finetune_(run, self.setting, self.progress, keeper)
        return run.history

    def judged(self, model: nn.Module) -> Judged:
        """The model on the evaluation data; without metrics where there is none or it has no labels."""
        if self.data.eval is None:
            return Judged({})
        return judge(model, self.data.eval, max(self.policy.train.batch_size, 256), device=self.setting.device)


def objective_of(policy: Policy, data: Data) -> Objective:
    """What is to be minimised, given what the data offers."""
    return Objective.of(policy.train, labelled=data.train.labelled, augments=data.train.augments)


def check_rounds(policy: Policy) -> None:
    """Raises UsageError where the first round would come before any training: all experts are still equal there."""
    rounds = policy.partition.rounds
    needs = score_named(policy.partition.score).NEEDS
    if needs is not Need.WEIGHTS and Phases.of(policy.train, rounds).round_steps[0] == 0:
        raise UsageError(
            f"train.steps {policy.train.steps}: the first of {rounds} partition rounds would come before any step, "
            "when there is nothing to score yet. Take more steps (--steps), or raise train.warmup."
        )


def check_data(model: nn.Module, data: Data, device: torch.device) -> None:
    """Raises FileError unless the model takes the data's batches and its outputs have room for every label."""
    for name, examples in (("the training data", data.train), ("the evaluation data", data.eval)):
        if examples is not None:
            check_examples(model, examples, name, device)


def check_examples(model: nn.Module, examples: Examples, name: str, device: torch.device) -> None:
    """As `check_data`, of one set; `name` is what the message calls it."""
    batch = examples.batch(torch.arange(min(2, len(examples)))).to(device, dtype_of(model))
    logits = _outputs(model, batch, name)
    labels = known_labels(examples)
    if batch.labels is None or labels is None or labels.is_floating_point():
        return
    fits = logits.dim() == batch.labels.dim() + 1
    if not fits and hasattr(model, "config") and batch.labels.dim() == 1:
        raise FileError(
            f"{name}: has one label an example, and the source gives outputs {list(logits.shape[1:])} for each: it has "
            "no head for classes. '--task classification' gives it one"
        )
    check_labels(labels, logits.shape[class_axis(logits, batch.labels)], name)


def _outputs(model: nn.Module, batch: Batch, name: str) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            return logits_of(forward(model.eval(), batch.inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        said = _beyond(model, batch)
        if said is not None:
            raise FileError(f"the model cannot take {name}: {said}") from error
        shapes = {key: list(tensor.shape) for key, tensor in tensors_of(batch.inputs).items()}
        raise FileError(
            f"the model cannot take {name}, batches of {_plain(shapes)}: {str(error).splitlines()[0]}. "
            "Check data.layout, data.input_key and the source."
        ) from error
    finally:
        model.train(training)


def _beyond(model: nn.Module, batch: Batch) -> str | None:
    """What token ids have to do with a failed forward: more of them than the largest table of a network has."""
    inputs = tensors_of(batch.inputs)
    ids = inputs.get("input_ids", inputs.get(""))
    tables = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    if ids is None or ids.is_floating_point() or not ids.numel() or not tables:
        return None
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= max(tables):
        odd = low if low < 0 else high
        return (
            f"it has token id {odd}, and the source's vocabulary goes from 0 to {max(tables) - 1}. Take the tokenizer "
            "that the source was trained with"
        )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and ids.dim() == 2 and ids.shape[1] > positions:
        return f"texts of {ids.shape[1]} tokens, and the source has {positions} positions. Lower data.max_length"
    return None


def _plain(shapes: dict[str, list[int]]) -> str:
    return str(shapes.get("", shapes))
