"""Aggregate: build W(b) for every sample by one matmul over all experts, then one grouped call for the batch.

The cheapest of the plain forms where a sample's weight is small beside its feature map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import convolution

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear
    from padconvert.layers.pad import PadLayer


def mixed(layer: PadLayer, part: str, routing_BK: Tensor) -> Tensor:
    """W(b) = Σ_k π_k(b) W_k for every sample: [B, *shape] in the mixing dtype."""
    full = layer.expert_tensors(part)
    with without_autocast(full):
        return (routing_BK.to(full.dtype) @ full.flatten(1)).reshape(routing_BK.shape[0], *full.shape[1:])


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """A grouped convolution whose groups are the samples: [B, C, …] as [1, B·C, …]."""
    batch = len(x)
    routing_BK = layer.route(x)
    weight = mixed(layer, "weight", routing_BK).flatten(0, 1)
    bias = mixed(layer, "bias", routing_BK).flatten() if layer.has_bias else None
    out = convolution(layer, x.flatten(0, 1)[None], weight, bias, batch * layer.groups)
    return out.reshape(batch, layer.out_channels, *out.shape[2:])


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """One weight a sample: [B, ..., C] → [B, ..., O]."""
    return project_by(layer, x, layer.route(x))


def project_by(layer: PadLinear, x: Tensor, routing_BK: Tensor) -> Tensor:
    """As `project`, with a routing from elsewhere. An input without positions, [B, C], has one of them."""
    if x.dim() == 2:
        return project_by(layer, x[:, None], routing_BK)[:, 0]
    weight_BOI = mixed(layer, "weight", routing_BK).to(x.dtype)
    out_BTO = x.flatten(1, -2) @ weight_BOI.transpose(1, 2)
    if layer.has_bias:
        out_BTO = out_BTO + mixed(layer, "bias", routing_BK).to(x.dtype)[:, None]
    return out_BTO.reshape(*x.shape[:-1], layer.out_features)
