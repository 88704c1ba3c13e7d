"""Whether labels belong to a model's outputs."""

from __future__ import annotations

from torch import Tensor

from padconvert.errors import FileError

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
