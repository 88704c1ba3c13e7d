"""Unfold: the windows of every sample as columns, then one batch of matrix products (2d)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.call import padded
from padconvert.layers.paths.case import Case, case_of, compute_dtype
from padconvert.layers.paths.cost import Machine, mixing, placing, products, whole_weights
from padconvert.layers.paths.parts import mixed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if len(case.spatial) != 2:
        return "windows are unfolded in two dimensions only"
    return "" if case.groups == 1 and not isinstance(case.padding, str) else "only without groups, padded by numbers"


def seconds(case: Case, machine: Machine) -> float:
    windows = case.entries // case.weight_shape[0] * case.positions
    return (
        mixing(case, machine)
        + whole_weights(case, machine)
        + products(case, machine)
        + placing(case.batch * windows, machine)
        + 2 * machine.call
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, O, H', W']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    weight_BOS = mixed(layer, "weight", routing_BK).to(dtype).flatten(2)
    wide, padding = padded(layer, x.to(dtype))
    kernel, dilation, stride = tuple(layer.kernel_size), tuple(layer.dilation), tuple(layer.stride)
    assert not isinstance(padding, str)
    columns_BSP = torch.nn.functional.unfold(wide, kernel, dilation, tuple(padding), stride)
    out_BOP = torch.bmm(weight_BOS, columns_BSP)
    if layer.has_bias:
        out_BOP = out_BOP + mixed(layer, "bias", routing_BK).to(dtype)[..., None]
    return out_BOP.view(*out_BOP.shape[:2], *case_of(layer, x).out_spatial)
