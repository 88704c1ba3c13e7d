"""A model on labelled examples, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padconvert.errors import FileError, VerificationError
from padconvert.finetune.data.examples import Batch, Examples
from padconvert.finetune.data.labels import IGNORED
from padconvert.finetune.data.preparation import Prepared
from padconvert.finetune.metrics import metrics_for
from padconvert.finetune.objectives import class_axis, dtype_of, fitted, forward, logits_of, task_loss
from padconvert.walk.quiet import evaluating


def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    metrics: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`loss` (mean over labels), `accuracy` (class labels) or `mse` (floating ones), and the `metrics` named: by the
    caller, else by the examples' own task (`matthews`, `f1`, `pearson`, `spearman`).

    Runs in eval mode, without gradients, over all examples in order; every module's mode is restored. Empty where
    the examples have no labels. Raises `VerificationError` for outputs that are not finite, `FileError` for labels
    that do not fit the model or are all ignored, `PolicyError` for a metric that does not apply.
    """
    with evaluating(model), torch.no_grad():
        first = examples.batch(torch.zeros(1, dtype=torch.int64)).labels
        if first is None:
            return {}
        named = metrics or (examples.metrics if isinstance(examples, Prepared) else ())
        gathered = metrics_for(first, named)
        loss_sum, count = 0.0, 0
        for indices in torch.arange(len(examples)).split(batch_size):
            batch = examples.batch(indices).to(device, dtype_of(model))
            loss, predicted, labels = _judge(model, batch, int(indices[0]))
            if len(labels) == 0:
                continue
            loss_sum, count = loss_sum + loss * len(labels), count + len(labels)
            for metric in gathered.values():
                metric.update(predicted, labels)
        if count == 0:
            raise FileError(f"the evaluation data: every label is {IGNORED} (ignored). Name data with labels")
        return {"loss": loss_sum / count, **{name: metric.value() for name, metric in gathered.items()}}


def _judge(model: nn.Module, batch: Batch, start: int) -> tuple[float, Tensor, Tensor]:
    """(mean loss, predictions [N], labels [N]) of the labels that count."""
    assert batch.labels is not None, "examples have labels in every batch or in none"
    output = logits_of(forward(model, batch.inputs))
    if not bool(output.isfinite().all()):
        raise VerificationError(
            f"the model's output is not finite on examples {start} to {start + len(batch) - 1}. "
            "Look for extreme values there, or lower the learning rate (--lr)"
        )
    loss = float(task_loss(output, batch.labels))
    if batch.labels.is_floating_point():
        return loss, output.flatten(), fitted(batch.labels, output).flatten()
    predicted = output.argmax(class_axis(output, batch.labels)).flatten()
    labels = batch.labels.flatten()
    used = labels != IGNORED
    return loss, predicted[used], labels[used]
