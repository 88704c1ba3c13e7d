"""Mix: run every expert on every input and mix the outputs. The form for routing by token, and for export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype, rows_apart
from padconvert.layers.paths.cost import Machine, convolutions, placing
from padconvert.layers.paths.parts import dynamic_part, mix, mixed
from padconvert.layers.paths.rows import static_rows
from padconvert.layers.placing import placed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can, which is always."""
    del case
    return ""


def seconds(case: Case, machine: Machine) -> float:
    share = case.dynamic_share if case.rows_apart else 1.0
    mixed = case.batch * case.outputs * case.num_experts * share
    return convolutions(case, machine, 1, 1 + (case.num_experts - 1) * share) + placing(round(mixed), machine)


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """y = Σ_k π_k (W_k ∗ x + b_k): [B, C, *spatial] → [B, O, *spatial'], the sum over experts in the mixing dtype.

    One convolution whose outputs are all experts' rows, and the static rows once. None knows the batch size: it is what
    an exported program needs.
    """
    routing_BK, x = layer.route(x), x.to(compute_dtype(x))
    if not rows_apart(layer):
        return _mixed(layer, x, layer.expert_tensors("weight"), routing_BK, _mixed_bias(layer, routing_BK))
    dynamic_KDS = dynamic_part(layer, "weight")
    assert dynamic_KDS is not None
    weight_KD = layer.view("weight").as_packed(dynamic_KDS)
    dynamic_bias = dynamic_part(layer, "bias") if layer.has_bias else None
    bias_BD = None if dynamic_bias is None else mix(layer, dynamic_bias, routing_BK)[..., 0]
    scaled_BK = routing_BK if layer.scale_logit is None else routing_BK * layer.scales()[1]
    dynamic = _mixed(layer, x, weight_KD, scaled_BK, bias_BD)
    if layer.weight_static is None:
        return dynamic
    return placed(static_rows(layer, x), dynamic, layer.units("weight"))


def _mixed_bias(layer: PadConv, routing_BK: Tensor) -> Tensor | None:
    return mixed(layer, "bias", routing_BK) if layer.has_bias else None


def _mixed(layer: PadConv, x: Tensor, weight_KO: Tensor, share_BK: Tensor, bias_BO: Tensor | None) -> Tensor:
    """Σ_k share_k (W_k ∗ x) + bias: [B, O, *spatial'], in the dtype of `x`."""
    if layer.groups == 1:
        out_BKO = convolution(layer, x, weight_KO.flatten(0, 1), None, 1).unflatten(1, weight_KO.shape[:2])
    else:  # an expert's rows lie among those of its groups
        out_BKO = torch.stack([convolution(layer, x, weight, None, layer.groups) for weight in weight_KO.unbind()], 1)
    with without_autocast(x):
        mixed_BO = torch.einsum("bk,bko...->bo...", share_BK, out_BKO.to(share_BK.dtype))
        if bias_BO is not None:
            mixed_BO = mixed_BO + bias_BO.to(share_BK.dtype).reshape(*bias_BO.shape, *(1,) * layer.spatial)
    return mixed_BO.to(x.dtype)


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
