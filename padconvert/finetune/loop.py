"""The fine-tune: warm-up, partition rounds, recovery. The same loop trains the static control.

A step is a function of the model, the seed and the step's number: its batch, its augmentation and its dropout are
drawn from generators seeded by them. So a run resumed at step t goes on as the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from padconvert.errors import VerificationError
from padconvert.finetune.balance import balancing_loss
from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.interrupts import Deferred
from padconvert.finetune.objectives import Objective, dtype_of, forward
from padconvert.finetune.optimizer import follow_, make_optimizer, set_lr_
from padconvert.finetune.phases import Phases
from padconvert.layers.collecting import collecting
from padconvert.partition import Partitioner
from padconvert.partition.scores import Need
from padconvert.policy import Policy
from padconvert.progress import Progress
from padconvert.rewrite import pad_layers

SEED_STRIDE = 1_000_003


@dataclass(slots=True)
class Run:
    """A fine-tune in progress. `step` steps are done; `history` has one entry a round and a few loss values."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    phases: Phases
    partitioner: Partitioner | None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Keeper(Protocol):
    """Keeps a run's state so that it can be resumed; see `resume.py`."""

    def restore_(self, run: Run) -> None: ...
    def step_done(self, run: Run) -> None: ...
    def save(self, run: Run) -> None: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same through a fine-tune."""

    policy: Policy
    objective: Objective
    teacher: nn.Module | None
    batches: Batches
    seed: int
    device: torch.device


def start(model: nn.Module, partitioner: Partitioner | None, setting: Setting) -> Run:
    """A run at step 0. Without a partitioner (the controls) it trains the same steps without rounds."""
    rounds = partitioner.rounds if partitioner is not None else 0
    train = setting.policy.train
    return Run(model, make_optimizer(model, train), Phases.of(train, rounds), partitioner)


def finetune_(run: Run, setting: Setting, progress: Progress, keeper: Keeper | None = None) -> None:
    """Train `run.model` in place to the last step.

    Raises VerificationError naming the layer where the loss or a score is not finite, and KeyboardInterrupt, saying
    which step is saved, when it is interrupted and has a keeper.
    """
    if keeper is not None:
        keeper.restore_(run)
    if run.partitioner is not None:
        run.partitioner.done = sum(place < run.step for place in run.phases.round_steps)
    run.model.train()
    with Deferred(keeper is not None) as interrupt:
        while run.step < run.phases.steps:
            _rounds_(run, setting)
            loss = _step_(run, setting)
            run.step += 1
            progress.step(run.step, run.phases.steps, loss=loss)
            if run.step % max(1, run.phases.steps // 100) == 0 or run.step == run.phases.steps:
                run.history.append({"step": run.step, "loss": loss})
            if keeper is not None:
                _keep(run, keeper, interrupt)
    _rounds_(run, setting)
    run.model.eval()


def _keep(run: Run, keeper: Keeper, interrupt: Deferred) -> None:
    if not interrupt.asked:
        keeper.step_done(run)
        return
    keeper.save(run)
    raise KeyboardInterrupt(f"step {run.step} of {run.phases.steps} is saved")


def _step_(run: Run, setting: Setting) -> float:
    """One optimizer step; returns its loss."""
    train = setting.policy.train
    assert train.lr is not None, "a plan's policy says it"
    torch.manual_seed(setting.seed * SEED_STRIDE + run.step)
    for layer in pad_layers(run.model).values():
        if layer.router is not None:
            layer.router.anneal_(run.phases.warmed(run.step), train.temperature_start)
    set_lr_(run.optimizer, train.lr * run.phases.lr_factor(run.step))
    clean, augmented = (_moved(batch, run.model, setting.device) for batch in setting.batches.pair(run.step))
    generator = torch.Generator().manual_seed(setting.seed * SEED_STRIDE + run.step)
    with collecting() as notes:
        loss = setting.objective.loss(run.model, setting.teacher, clean, augmented, generator)
    balancing = balancing_loss(notes, train)
    loss = loss if balancing is None else loss + balancing
    if not bool(torch.isfinite(loss)):
        raise VerificationError(_blame(run, clean))
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    return float(loss.detach())


def _moved(batch: Batch, model: nn.Module, device: torch.device) -> Batch:
    return batch.to(device, dtype_of(model))


# ---- partition rounds --------------------------------------------------------------------------------------------


def _rounds_(run: Run, setting: Setting) -> None:
    if run.partitioner is None:
        return
    for t in run.phases.rounds_before(run.step):
        done = run.partitioner.round_(t, scoring_losses(run.model, run.partitioner.needs, setting, t))
        follow_(run.optimizer, done.moved)
        run.history.append({"step": run.step, "round": t, "ratio": done.ratio, "n_dynamic": float(done.n_dynamic)})


def scoring_losses(model: nn.Module, need: Need, setting: Setting, t: int) -> list[Callable[[], Tensor]]:
    """The fixed micro-batches of round t, each as a call that computes its loss; single samples where asked for."""
    partition = setting.policy.partition
    batches = Batches(setting.batches.examples, partition.micro_batch, setting.seed)
    numbers = [batches.indices((t - 1) * partition.batches + i) for i in range(partition.batches)]
    if need is Need.SAMPLE_GRADIENTS:
        numbers = [single for indices in numbers for single in indices.split(1)]

    def loss_of(place: int, indices: Tensor) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            generator = torch.Generator().manual_seed(setting.seed * SEED_STRIDE + 7919 * t + place)
            batch = _moved(setting.batches.examples.batch(indices), model, setting.device)
            return setting.objective.scoring_loss(model, setting.teacher, batch, generator)

        return loss

    return [loss_of(place, indices) for place, indices in enumerate(numbers)]


def routing_forwards(model: nn.Module, batches: Batches, device: torch.device) -> Sequence[Callable[[], object]]:
    """Forward calls over a few training batches, for the routers' initialisation."""

    def run_one(step: int) -> Callable[[], object]:
        return lambda: forward(model, _moved(batches.at(step), model, device).inputs)

    return [run_one(step) for step in range(min(16, batches.per_epoch))]


# ---- non-finite losses -------------------------------------------------------------------------------------------


def _blame(run: Run, batch: Batch) -> str:
    """Names the first parameter, or the first layer's output, that is not finite."""
    where = next((n for n, p in run.model.named_parameters() if not bool(torch.isfinite(p).all())), None)
    what = f"parameter '{where}'" if where is not None else _first_bad_output(run.model, batch)
    return (
        f"The loss is not finite at step {run.step + 1}, first seen in {what}. "
        "Lower the learning rate (--lr, train.lr), or look for extreme values in the data."
    )


def _first_bad_output(model: nn.Module, batch: Batch) -> str:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            del module, args
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of layer '{found[0]}'" if found else "the loss itself"
