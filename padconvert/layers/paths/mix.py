"""Mix: run every expert on every input and mix the outputs. The form for routing by token, and for export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import convolution

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """y = Σ_k π_k (W_k ∗ x + b_k): [B, C, *spatial] → [B, O, *spatial'], the sum over experts in the mixing dtype.

    K convolutions in place of one, but none knows the batch size: what an exported program needs.
    """
    routing_BK = layer.route(x)
    weight_KO = layer.expert_tensors("weight")
    outs = [convolution(layer, x, weight_KO[k], None, layer.groups) for k in range(layer.num_experts)]
    with without_autocast(x):
        out_BKO = torch.stack(outs, 1).to(routing_BK.dtype)
        mixed_BO = torch.einsum("bk,bko...->bo...", routing_BK, out_BKO)
        if layer.has_bias:
            bias_BO = routing_BK @ layer.expert_tensors("bias").to(routing_BK.dtype)
            mixed_BO = mixed_BO + bias_BO.reshape(*bias_BO.shape, *(1,) * layer.spatial)
    return mixed_BO.to(outs[0].dtype)


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """y = Σ_k π_k (W_k x + b_k): [..., C] → [..., O], the sum over experts in the mixing dtype."""
    routing_TK = layer.route(x).reshape(-1, layer.num_experts)
    weight_KOI = layer.expert_tensors("weight").to(x.dtype)
    out_TKO = torch.nn.functional.linear(x.reshape(-1, layer.in_features), weight_KOI.flatten(0, 1))
    out_TKO = out_TKO.reshape(-1, layer.num_experts, layer.out_features)
    with without_autocast(x):
        mixed_TO = torch.einsum("tk,tko->to", routing_TK, out_TKO.to(routing_TK.dtype))
        if layer.has_bias:
            mixed_TO = mixed_TO + routing_TK @ layer.expert_tensors("bias").to(routing_TK.dtype)
    return mixed_TO.to(out_TKO.dtype).reshape(*x.shape[:-1], layer.out_features)
