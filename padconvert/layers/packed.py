"""Packed storage of one partially dynamic tensor (a weight or a bias), and how it is taken apart and put together.

A tensor is seen as units: [U, size], where a unit is an entry (`element`, size 1), a row (`channel`), or what belongs
to a hidden unit of a feed-forward block (`neuron`: a row, or a column of the block's last weight). Static
units are stored once, dynamic units K times, both in ascending order of their index:

    static  [N, S]        dynamic  [K, D, S]        dynamic_mask  [U], True where dynamic

Legend of names: K experts, U = D + N units, D dynamic, N static, S entries of a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from padconvert.layers.placing import placed
from padconvert.words import Granularity


@dataclass(frozen=True, slots=True)
class UnitView:
    """How a tensor of `shape` is cut into units: entries, or slices along `dim` (rows; columns of a matrix for 1)."""

    shape: tuple[int, ...]
    granularity: Granularity
    dim: int = 0

    @property
    def by_entry(self) -> bool:
        return self.granularity is Granularity.ELEMENT

    @property
    def units(self) -> int:
        return math.prod(self.shape) if self.by_entry else self.shape[self.dim]

    @property
    def size(self) -> int:
        return 1 if self.by_entry else math.prod(self.shape) // self.shape[self.dim]

    def packed_shape(self, n: int) -> tuple[int, ...]:
        """The shape of `n` units as a checkpoint stores them: [n], or `shape` with n along `dim`."""
        return (n,) if self.by_entry else (*self.shape[: self.dim], n, *self.shape[self.dim + 1 :])

    @property
    def packed_dim(self) -> int:
        """Along which dimension units lie in a packed tensor (without its experts)."""
        return 0 if self.by_entry else self.dim

    def cut_full(self, tensor: Tensor) -> Tensor:
        """[..., *shape] → [..., U, S]."""
        lead = tensor.shape[: tensor.dim() - len(self.shape)]
        return self._units_first(tensor, len(lead)).reshape(*lead, self.units, self.size)

    def as_full(self, tensor: Tensor) -> Tensor:
        """[..., U, S] → [..., *shape]."""
        return self._shaped(tensor, self.shape)

    def cut_packed(self, tensor: Tensor) -> Tensor:
        """[..., *packed_shape(n)] → [..., n, S]."""
        lead = tensor.shape[: tensor.dim() - len(self.packed_shape(0))]
        moved = self._units_first(tensor, len(lead))
        return moved.reshape(*lead, tensor.shape[len(lead) + self.packed_dim], self.size)

    def as_packed(self, tensor: Tensor) -> Tensor:
        """[..., n, S] → [..., *packed_shape(n)], as a checkpoint stores it."""
        return self._shaped(tensor, self.packed_shape(tensor.shape[-2]))

    def _units_first(self, tensor: Tensor, lead: int) -> Tensor:
        return tensor.movedim(lead + self.packed_dim, lead) if self.packed_dim else tensor

    def _shaped(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[..., n, S] → [..., *shape], units along `packed_dim`."""
        lead = tensor.shape[:-2]
        if not self.packed_dim:
            return tensor.reshape(*lead, *shape)
        others = (*shape[: self.dim], *shape[self.dim + 1 :])
        moved = tensor.reshape(*lead, tensor.shape[-2], *others)
        return moved.movedim(len(lead), len(lead) + self.dim)


@dataclass(frozen=True, slots=True)
class Units:
    """Where the units of a packed tensor belong: ascending indices of the dynamic and of the static ones, int64."""

    dynamic: Tensor
    static: Tensor

    @staticmethod
    def of_mask(dynamic_mask: Tensor) -> Units:
        return Units(dynamic_mask.nonzero()[:, 0], (~dynamic_mask).nonzero()[:, 0])

    @staticmethod
    def none() -> Units:
        """Of nothing: where they belong is not known yet."""
        return Units(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))

    @staticmethod
    def all(total: int, dynamic: bool, device: torch.device) -> Units:
        """All of one kind."""
        every, none = torch.arange(total, device=device), torch.empty(0, dtype=torch.int64, device=device)
        return Units(every, none) if dynamic else Units(none, every)

    def mask(self) -> Tensor:
        """bool [U], True where dynamic."""
        mask = torch.zeros(len(self.dynamic) + len(self.static), dtype=torch.bool, device=self.dynamic.device)
        return mask.index_fill(0, self.dynamic, True)


def assemble(static_NS: Tensor | None, dynamic_KDS: Tensor | None, units: Units, experts: int) -> Tensor:
    """All experts' full tensors, [K, U, S]: static units repeated, dynamic units in their places.

    Differentiable in both parts. Since Σπ = 1, mixing the result mixes the dynamic part and keeps the static one.
    """
    if static_NS is None:
        assert dynamic_KDS is not None
        return dynamic_KDS
    if dynamic_KDS is None:
        return static_NS.expand(experts, -1, -1)
    return placed(static_NS.expand(experts, -1, -1), dynamic_KDS, units)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [U] → uint8 [⌈U/8⌉], little bit order, tail bits zero."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """uint8 [⌈length/8⌉], little bit order → bool [length]."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:length].bool()
