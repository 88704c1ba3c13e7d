"""Compute paths: how a Pad layer gets its output from its parts. Layers call `convolve` or `project`, nothing else.

Each path is one file with a `convolve` or a `project`, or both; all give the same values, they differ in time.
A further path for convolutions is a further file, with `unable`, `seconds` and `convolve`, and its name in `chooser`;
no layer and no caller changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths import aggregate, experts, mix, shared, static
from padconvert.layers.paths.chooser import PATHS, choose
from padconvert.layers.placing import memory_format
from padconvert.words import Place

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial'], held channels last where `x` is."""
    if not layer.is_dynamic or (not torch.compiler.is_exporting() and len(x) == 0):  # `len` would fix an exported size
        return static.convolve(layer, x)
    if layer.shares_experts:
        return shared.convolve(layer, x)
    out: Tensor = PATHS[choose(layer, x)].convolve(layer, x)
    form = torch.contiguous_format if torch.compiler.is_exporting() else memory_format(x)
    return out if form is torch.contiguous_format else out.contiguous(memory_format=form)


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """[..., C] → [..., O]."""
    if not layer.is_dynamic or (not torch.compiler.is_exporting() and x.numel() == 0):
        return static.project(layer, x)
    if layer.shares_experts and layer.place is Place.ALONE:
        return shared.project(layer, x)
    if layer.top_k:
        return experts.project(layer, x)
    if x.dim() > 2 and not layer.pooling_is_per_token():
        return aggregate.project(layer, x)
    return mix.project(layer, x)
