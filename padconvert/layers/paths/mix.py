"""Mix: run every expert on every token and mix the outputs. The form for routing by token, and for export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from padconvert.layers.linear import PadLinear


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """y = Σ_k π_k (W_k x + b_k): [..., C] → [..., O], the sum over experts in the mixing dtype."""
    routing_TK = layer.route(x).reshape(-1, layer.num_experts)
    weight_KOI = layer.expert_tensors("weight").to(x.dtype)
    out_TKO = torch.nn.functional.linear(x.reshape(-1, layer.in_features), weight_KOI.flatten(0, 1))
    out_TKO = out_TKO.reshape(-1, layer.num_experts, layer.out_features)
    with torch.autocast(x.device.type, enabled=False):
        mixed_TO = torch.einsum("tk,tko->to", routing_TK, out_TKO.to(routing_TK.dtype))
        if layer.has_bias:
            mixed_TO = mixed_TO + routing_TK @ layer.expert_tensors("bias").to(routing_TK.dtype)
    return mixed_TO.to(out_TKO.dtype).reshape(*x.shape[:-1], layer.out_features)
