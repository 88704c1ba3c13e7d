"""What a reader gives: numbered examples, from which any batch can be taken at any time.

Nothing here has a position or a state: the batch for given indices is always the same, so that a resume needs a step
number only and several processes can take what they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from padconvert.errors import FileError


@dataclass(frozen=True, slots=True)
class Batch:
    """`inputs`: one tensor [B, …] for a model's first argument, or name → tensor [B, …] for its keywords.

    `labels`: int64 class numbers [B] or [B, …] (−100: ignored), floating targets, or None.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(tensors_of(self.inputs).values())))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The batch on `device`, floating inputs in `dtype`; integer inputs and all labels keep their dtype."""
        labels = None if self.labels is None else self.labels.to(device)
        if isinstance(self.inputs, Tensor):
            return Batch(_moved(self.inputs, device, dtype), labels)
        return Batch({name: _moved(tensor, device, dtype) for name, tensor in self.inputs.items()}, labels)


class Examples(Protocol):
    """What every reader returns, and what `pkg.mod:function` may return."""

    @property
    def num_classes(self) -> int | None:
        """How many classes the data itself names (class folders), or None where it names none."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The examples `indices` (int64 [B]), in that order; a pure function of them."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorExamples:
    """Examples held in memory, in the dtype they were stored in (8-bit images stay 8-bit)."""

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None = None
    num_classes: int | None = None

    def __len__(self) -> int:
        return len(next(iter(tensors_of(self.inputs).values())))

    def batch(self, indices: Tensor) -> Batch:
        labels = None if self.labels is None else self.labels[indices]
        if isinstance(self.inputs, Tensor):
            return Batch(self.inputs[indices], labels)
        return Batch({name: tensor[indices] for name, tensor in self.inputs.items()}, labels)


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some examples of others: number i here is number `indices[i]` there."""

    whole: Examples
    indices: Tensor

    @property
    def num_classes(self) -> int | None:
        return self.whole.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return known_class_names(self.whole)

    @property
    def labels(self) -> Tensor | None:
        labels = known_labels(self.whole)
        return None if labels is None else labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> Batch:
        return self.whole.batch(self.indices[indices])


def tensors_of(inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs by name; a single tensor's name is empty."""
    return {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)


def known_labels(examples: Examples) -> Tensor | None:
    """All labels where they are known without reading the inputs, else None."""
    labels = getattr(examples, "labels", None)
    return labels if isinstance(labels, Tensor) else None


def known_class_names(examples: Examples) -> tuple[str, ...] | None:
    """The classes' names by number where the data has them, else None."""
    names = getattr(examples, "class_names", None)
    return tuple(names) if names else None


def attention_mask_of(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | None:
    """[B, T] bool, true where a position counts and false where it is padding; None where the inputs do not say."""
    found = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    return found != 0 if found is not None and found.ndim == 2 else None


def checked(examples: TensorExamples, origin: str) -> TensorExamples:
    """`examples` with labels of a settled form: whole numbers as int64 [N, …], others floating.

    Raises `FileError` naming `origin` where there is nothing, lengths differ or a value is not finite.
    """
    lengths = {name: len(tensor) for name, tensor in tensors_of(examples.inputs).items()}
    if 0 in lengths.values():
        raise FileError(f"{origin}: holds no examples. Name a file with at least one")
    if examples.labels is not None:
        lengths["the labels"] = len(examples.labels)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name or 'the inputs'}: {length}" for name, length in lengths.items())
        raise FileError(f"{origin}: inputs and labels differ in length ({found}). Every example needs its own of each")
    for name, tensor in tensors_of(examples.inputs).items():
        _require_finite(tensor, f"{origin}: input {name}" if name else f"{origin}: the inputs")
    labels = None if examples.labels is None else settled_labels(examples.labels)
    if labels is not None:
        _require_finite(labels, f"{origin}: the labels")
    return TensorExamples(examples.inputs, labels, examples.num_classes)


def settled_labels(labels: Tensor) -> Tensor:
    """Whole numbers as int64, a column [N, 1] of them as [N]; floating labels as they are."""
    if labels.is_floating_point():
        return labels
    labels = labels.long()
    return labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _require_finite(tensor: Tensor, where: str) -> None:
    if not tensor.is_floating_point():
        return
    for start in range(0, len(tensor), 4096):  # in pieces: the mask of a large array is large too
        piece = tensor[start : start + 4096]
        finite = piece.isfinite().reshape(len(piece), -1).all(1)
        if not finite.all():
            bad = start + int((~finite).nonzero()[0])
            raise FileError(f"{where}: example {bad} holds NaN or infinity. Remove or repair it")


def _moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
