"""A model on labelled examples, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padconvert.errors import FileError, VerificationError
from padconvert.finetune.data.examples import Batch, Examples
from padconvert.finetune.data.labels import IGNORED
from padconvert.finetune.data.preparation import Prepared
from padconvert.finetune.metrics import metrics_for
from padconvert.finetune.objectives import class_axis, dtype_of, fitted, forward, logits_of, task_loss
from padconvert.walk.quiet import evaluating


@dataclass(frozen=True, slots=True)
class Judged:
    """The metrics, and of class labels which examples were right: [N] in fp64, the share of an example's labels that
    count and were met. Examples of which no label counts are left out. None for floating labels."""

    metrics: dict[str, float]
    right_N: Tensor | None = None


def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    metrics: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics alone; see `judge`."""
    return judge(model, examples, batch_size, metrics, device).metrics


def judge(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    metrics: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Judged:
    """`loss` (mean over labels), `accuracy` (class labels) or `mse` (floating ones), and the `metrics` named: by the
    caller, else by the examples' own task (`matthews`, `f1`, `pearson`, `spearman`).

    Runs in eval mode, without gradients, over all examples in order; every module's mode is restored. Empty where
    the examples have no labels. Raises `VerificationError` for outputs that are not finite, `FileError` for labels
    that do not fit the model or are all ignored, `PolicyError` for a metric that does not apply.
    """
    with evaluating(model), torch.no_grad():
        first = examples.batch(torch.zeros(1, dtype=torch.int64)).labels
        if first is None:
            return Judged({})
        named = metrics or (examples.metrics if isinstance(examples, Prepared) else ())
        gathered = metrics_for(first, named)
        loss_sum, count = 0.0, 0
        right: list[Tensor] = []
        for indices in torch.arange(len(examples)).split(batch_size):
            batch = examples.batch(indices).to(device, dtype_of(model))
            loss, predicted_BT, labels_BT = _answers(model, batch, int(indices[0]))
            classes = not labels_BT.is_floating_point()
            used_BT = labels_BT != IGNORED if classes else torch.ones_like(labels_BT, dtype=torch.bool)
            predicted, labels = predicted_BT[used_BT], labels_BT[used_BT]
            if len(labels) == 0:
                continue
            if classes:
                right.append(_shares(predicted_BT == labels_BT, used_BT))
            loss_sum, count = loss_sum + loss * len(labels), count + len(labels)
            for metric in gathered.values():
                metric.update(predicted, labels)
        if count == 0:
            raise FileError(f"the evaluation data: every label is {IGNORED} (ignored). Name data with labels")
        numbers = {"loss": loss_sum / count, **{name: metric.value() for name, metric in gathered.items()}}
        return Judged(numbers, torch.cat(right) if right else None)


def _shares(right_BT: Tensor, used_BT: Tensor) -> Tensor:
    """Of every example with a label that counts, the share of them that is right."""
    count_B = used_BT.sum(1)
    share_B = (right_BT & used_BT).sum(1).double() / count_B
    return share_B[count_B > 0].cpu()


def _answers(model: nn.Module, batch: Batch, start: int) -> tuple[float, Tensor, Tensor]:
    """(mean loss of the labels that count, predictions [B, T], labels [B, T]): T is 1 for one label an example."""
    assert batch.labels is not None, "examples have labels in every batch or in none"
    output = logits_of(forward(model, batch.inputs))
    if not bool(output.isfinite().all()):
        raise VerificationError(
            f"the model's output is not finite on examples {start} to {start + len(batch) - 1}. "
            "Look for extreme values there, or lower the learning rate (--lr)"
        )
    loss = float(task_loss(output, batch.labels))
    if batch.labels.is_floating_point():
        return loss, _by_example(output), _by_example(fitted(batch.labels, output))
    return loss, _by_example(output.argmax(class_axis(output, batch.labels))), _by_example(batch.labels)


def _by_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
