"""Static: all experts are one, so no routing is needed. For κ = 0, and for empty batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.call import convolution

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    bias = layer.expert_tensors("bias")[0] if layer.has_bias else None
    return convolution(layer, x, layer.expert_tensors("weight")[0], bias, layer.groups)


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """[..., C] → [..., O]."""
    bias = layer.expert_tensors("bias")[0].to(x.dtype) if layer.has_bias else None
    return torch.nn.functional.linear(x, layer.expert_tensors("weight")[0].to(x.dtype), bias)
