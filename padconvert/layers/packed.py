"""Packed storage of one partially dynamic tensor (a weight or a bias), and how it is taken apart and put together.

A tensor is seen as units: [U, size], where a unit is an entry (`element`, size 1) or a row (`channel`). Static
units are stored once, dynamic units K times, both in ascending order of their index:

    static  [N, S]        dynamic  [K, D, S]        dynamic_mask  [U], True where dynamic

Legend of names: K experts, U = D + N units, D dynamic, N static, S entries of a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from padconvert.words import Granularity


@dataclass(frozen=True, slots=True)
class UnitView:
    """How a tensor of `shape` is cut into units."""

    shape: tuple[int, ...]
    granularity: Granularity

    @property
    def units(self) -> int:
        return math.prod(self.shape) if self.granularity is Granularity.ELEMENT else self.shape[0]

    @property
    def size(self) -> int:
        return 1 if self.granularity is Granularity.ELEMENT else math.prod(self.shape[1:])

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The trailing dimensions of a packed tensor: () for entries, the row's shape for rows."""
        return () if self.granularity is Granularity.ELEMENT else self.shape[1:]

    def cut_full(self, tensor: Tensor) -> Tensor:
        """[..., *shape] → [..., U, S]."""
        return tensor.reshape(*tensor.shape[: tensor.dim() - len(self.shape)], self.units, self.size)

    def cut_packed(self, tensor: Tensor) -> Tensor:
        """[..., n, *unit_shape] → [..., n, S]."""
        return tensor.reshape(*tensor.shape[: tensor.dim() - len(self.unit_shape)], self.size)

    def as_packed(self, tensor: Tensor) -> Tensor:
        """[..., n, S] → [..., n, *unit_shape], as a checkpoint stores it."""
        return tensor.reshape(*tensor.shape[:-1], *self.unit_shape)


@dataclass(frozen=True, slots=True)
class Units:
    """Where the units of a packed tensor belong: ascending indices of the dynamic and of the static ones, int64."""

    dynamic: Tensor
    static: Tensor

    @staticmethod
    def of_mask(dynamic_mask: Tensor) -> Units:
        return Units(dynamic_mask.nonzero()[:, 0], (~dynamic_mask).nonzero()[:, 0])

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
    total = len(units.dynamic) + len(units.static)
    out_KUS = dynamic_KDS.new_zeros(experts, total, dynamic_KDS.shape[-1])
    out_KUS = out_KUS.index_copy(1, units.dynamic, dynamic_KDS)
    return out_KUS.index_copy(1, units.static, static_NS.expand(experts, -1, -1))


def pack_bits(mask: Tensor) -> Tensor:
    """bool [U] → uint8 [⌈U/8⌉], little bit order, tail bits zero."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """uint8 [⌈length/8⌉], little bit order → bool [length]."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:length].bool()
