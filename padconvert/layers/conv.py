"""`PadConv1d`, `PadConv2d`, `PadConv3d`: partially dynamic convolutions (DY-Conv under a partition)."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.facts import CALL_OPTIONS, LayerFacts
from padconvert.layers.pad import PadLayer
from padconvert.layers.paths import convolve
from padconvert.layers.routers import RouterModule


class PadConv(PadLayer):
    """A convolution whose weight is mixed per sample. Routed by the feature map's mean."""

    spatial: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _copy_call_options(self, facts: LayerFacts) -> None:
        for name in CALL_OPTIONS:
            setattr(self, name, getattr(facts, name))
        # parents read these
        self.out_channels = facts.weight_shape[0]
        self.in_channels = facts.weight_shape[1] * facts.groups
        self.kernel_size = facts.weight_shape[2:]

    @property
    def stored_dtype(self) -> torch.dtype:
        """As `PadLayer`'s, at once: a small convolution at batch 1 takes little longer than a look for its weight."""
        stored = self._parameters["weight_static"]
        stored = self._parameters["weight_dynamic"] if stored is None else stored
        assert stored is not None
        return stored.dtype

    @property
    def router_channels(self) -> int:
        return self.in_channels

    def pooled(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] → [B, C] in the mixing dtype, without a copy of the map in it."""
        # not `mean`: its gradient is divided position by position
        summed_BC = x.sum(tuple(range(2, x.dim())), dtype=self.mixing_dtype)
        return summed_BC / math.prod(x.shape[2:])  # `numel` would fix an exported size

    def route(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return cast(Tensor, cast(RouterModule, self.router)(self.pooled(x)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *spatial] → [B, O, *spatial']; without a batch dimension as torch's layers."""
        if x.dim() == self.spatial + 1:
            return self.forward(x[None])[0]
        return convolve(self, x)

    def facts(self) -> LayerFacts:
        return dataclasses.replace(super().facts(), **{name: getattr(self, name) for name in CALL_OPTIONS})


class PadConv1d(PadConv):
    spatial = 1


class PadConv2d(PadConv):
    spatial = 2


class PadConv3d(PadConv):
    spatial = 3
