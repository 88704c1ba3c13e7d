"""Compute paths: how a Pad layer gets its output from its parts. Layers call `convolve` or `project`, nothing else.

Each path is one file with a `convolve` or a `project`, or both; all give the same values, they differ in time.
A further path is a further file and a line here; no layer and no caller changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths import aggregate, experts, mix, static

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    if not layer.is_dynamic:
        return static.convolve(layer, x)
    if torch.compiler.is_exporting():
        return mix.convolve(layer, x)  # a group for every sample would fix the batch size
    if len(x) == 0:
        return static.convolve(layer, x)
    return aggregate.convolve(layer, x)


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """[..., C] → [..., O]."""
    if not layer.is_dynamic or (not torch.compiler.is_exporting() and x.numel() == 0):
        return static.project(layer, x)
    if layer.top_k:
        return experts.project(layer, x)
    if x.dim() > 2 and not layer.pooling_is_per_token():
        return aggregate.project(layer, x)
    return mix.project(layer, x)
