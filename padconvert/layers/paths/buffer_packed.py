"""Buffer, packed: inference only. As `buffer`, with the static rows first in the kept weight: a sample's mix lies where
it was computed, and its outputs are brought into order instead, which are the fewer where a map is small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths import buffer
from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, mixing, placing
from padconvert.layers.paths.parts import side_by_side

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if not case.rows_apart:
        return "only for whole rows that read the same inputs"
    return buffer.unable(case) if case.n_static else "no row of the layer is static"


def seconds(case: Case, machine: Machine) -> float:
    copied = case.batch * case.dynamic_entries * machine.read if case.batch > 1 else 0.0
    in_order = placing(case.batch * case.outputs, machine)
    return mixing(case, machine) + copied + convolutions(case, machine, case.batch) + in_order


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    x = x.to(dtype)
    biases = side_by_side(layer, "bias", routing_BK).to(dtype) if layer.has_bias else [None] * len(x)
    weights, places = buffer.written_packed(layer, routing_BK, dtype)
    product = _is_product(layer)
    outs = [
        _product(one, weight, bias) if product else convolution(layer, one, weight, bias, 1)
        for one, weight, bias in zip(x.split(1), weights, biases, strict=True)
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(1, places)


def _is_product(layer: PadConv) -> bool:
    """A 1x1 convolution that reads every position once."""
    plain = layer.padding in ("same", "valid") or not any(layer.padding)
    return plain and layer.weight_shape[2:].count(1) == layer.spatial and layer.stride.count(1) == layer.spatial


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight_OI, x_IP = weight.flatten(1), x[0].flatten(1)
    out_OP = torch.mm(weight_OI, x_IP) if bias is None else torch.addmm(bias[:, None], weight_OI, x_IP)
    return out_OP.view(1, len(out_OP), *x.shape[2:])
