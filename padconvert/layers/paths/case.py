"""`Case`: all that a choice of path depends on, as numbers. Equal cases are given equal paths.

It holds no tensor, so that a choice can be made, kept and explained without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.words import Granularity

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


@dataclass(frozen=True, slots=True)
class Case:
    """One call of one convolution: its shape, and where and how it runs."""

    device: str
    dtype: torch.dtype
    gradient: bool
    compiled: bool
    plain_tensor: bool
    batch: int
    spatial: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    zero_padded: bool
    granularity: Granularity
    num_experts: int
    n_static: int
    n_dynamic: int
    rows_apart: bool

    @property
    def by_row(self) -> bool:
        return self.granularity is not Granularity.ELEMENT

    @property
    def entries(self) -> int:
        """Entries of the weight."""
        return math.prod(self.weight_shape)

    @property
    def dynamic_share(self) -> float:
        return self.n_dynamic / (self.n_dynamic + self.n_static)

    @property
    def dynamic_entries(self) -> int:
        return round(self.entries * self.dynamic_share)

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution without padding or groups: a matrix product at every (strided) position."""
        unpadded = self.padding in ("same", "valid") or not any(p for p in self.padding if isinstance(p, int))
        return unpadded and self.groups == 1 and math.prod(self.weight_shape[2:]) == 1

    @property
    def out_spatial(self) -> tuple[int, ...]:
        sides = []
        for at, size in enumerate(self.spatial):
            reach = self.dilation[at] * (self.weight_shape[2 + at] - 1)
            match self.padding:
                case "same":
                    pad = reach
                case "valid":
                    pad = 0
                case _:
                    pad = 2 * int(self.padding[at])
            sides.append(max((size + pad - reach - 1) // self.stride[at] + 1, 0))
        return tuple(sides)

    @property
    def positions(self) -> int:
        """Positions of a sample's output."""
        return math.prod(self.out_spatial)

    @property
    def inputs(self) -> int:
        """Entries of a sample's input."""
        return self.weight_shape[1] * self.groups * math.prod(self.spatial)

    @property
    def outputs(self) -> int:
        """Entries of a sample's output."""
        return self.weight_shape[0] * self.positions

    @property
    def macs(self) -> int:
        """Multiply-adds of the static layer for one sample."""
        return self.entries * self.positions


def case_of(layer: PadConv, x: Tensor) -> Case:
    """The case of a call of `layer` on `x` [B, C, *spatial]."""
    device = x.device.type
    compiled, weight = torch.compiler.is_compiling(), layer.units("weight")
    return Case(
        device=device,
        dtype=compute_dtype(x),
        gradient=torch.is_grad_enabled(),
        compiled=compiled,
        plain_tensor=is_plain(x),
        batch=len(x),
        spatial=tuple(x.shape[2:]),
        weight_shape=layer.weight_shape,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        zero_padded=layer.padding_mode == "zeros",
        granularity=layer.granularity,
        num_experts=layer.num_experts,
        n_static=len(weight.static),
        n_dynamic=len(weight.dynamic),
        rows_apart=rows_apart(layer),
    )


def is_plain(x: Tensor) -> bool:
    """Whether `x` is held in memory, and no stand-in of a program that is traced or transformed (where the weights may
    be what is transformed, and `x` is none)."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and not torch._C._are_functorch_transforms_active()


def rows_apart(layer: PadConv) -> bool:
    """Whether dynamic rows can be computed apart from static ones: rows read the same inputs (no groups), and the
    bias is where its row is (between two rounds of a partition it may not be yet)."""
    together = not layer.has_bias or len(layer.units("bias").dynamic) == len(layer.units("weight").dynamic)
    return layer.granularity is not Granularity.ELEMENT and layer.groups == 1 and together


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` is computed in: autocast's, where that is on."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
