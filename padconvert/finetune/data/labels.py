"""Whether labels belong to a task, and to a model's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.tasks import Task

#: a label that counts neither in a loss nor in a metric, as everywhere in torch
IGNORED = -100


def check_labels(labels: Tensor, num_outputs: int, origin: str = "the data") -> None:
    """Raises `FileError` unless whole labels lie in [0, num_outputs) or are −100 (ignored)."""
    if labels.is_floating_point():
        return
    used = labels[labels != IGNORED]
    if used.numel() == 0:
        return
    low, high = (int(bound) for bound in used.aminmax())
    if low < 0 or high >= num_outputs:
        wrong = low if low < 0 else high
        raise FileError(
            f"{origin}: label {wrong} is out of range: the model has {num_outputs} outputs, "
            f"so labels go from 0 to {num_outputs - 1}. Renumber the labels, or take the data the model was made for"
        )


def labels_for(task: Task | None, labels: Tensor, origin: str) -> Tensor:
    """Labels in the form that the task needs: fp32 for numbers, int64 for classes; without a task as they are.

    Raises `FileError` for class labels that are no whole numbers.
    """
    if task is None:
        return labels
    if task.regression:
        return labels.float()
    if not labels.is_floating_point():
        return labels
    odd = (labels != labels.round()).nonzero()
    if len(odd):
        row = int(odd[0, 0])
        raise FileError(
            f"{origin}: label {float(labels[row].flatten()[0])} (row {row}) is no class number. Correct it, or set "
            "data.task: regression"
        )
    return labels.to(torch.int64)
