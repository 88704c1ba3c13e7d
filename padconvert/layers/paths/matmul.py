"""Matmul: a 1x1 convolution is one matrix product for every sample, done as one batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, mixing, placing, products, whole_weights
from padconvert.layers.paths.parts import mixed
from padconvert.layers.placing import memory_format

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    return "" if case.pointwise else "only for 1x1 convolutions without padding and groups"


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + whole_weights(case, machine)
        + products(case, machine)
        + placing(case.batch * case.inputs * any(step > 1 for step in case.stride), machine)
        + machine.call
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    weight_BOI = mixed(layer, "weight", routing_BK).to(dtype).flatten(2)
    bias_BO = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else None
    for dimension, step in enumerate(layer.stride, start=2):
        x = x if step == 1 else x.index_select(dimension, torch.arange(0, x.shape[dimension], step, device=x.device))
    x = x.to(dtype)
    if memory_format(x) is not torch.contiguous_format:
        rows_BPI = x.movedim(1, -1).flatten(1, -2)
        out_BPO = _product(rows_BPI, weight_BOI.transpose(1, 2), None if bias_BO is None else bias_BO[:, None])
        return out_BPO.view(len(x), *x.shape[2:], -1).movedim(-1, 1)
    out_BOP = _product(weight_BOI, x.flatten(2), None if bias_BO is None else bias_BO[..., None])
    return out_BOP.view(*out_BOP.shape[:2], *x.shape[2:])


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)
