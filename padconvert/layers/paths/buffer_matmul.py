"""Buffer and matmul: inference only. A 1x1 convolution is one matrix product a sample, by the kept weight of `buffer`,
written straight into its place of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths import buffer
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, mixing, products
from padconvert.layers.paths.parts import mixed
from padconvert.layers.placing import memory_format

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if not case.pointwise or any(step > 1 for step in case.stride):
        return "only for 1x1 convolutions without padding, stride and groups"
    return buffer.unable(case)


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + case.batch * case.dynamic_entries * (machine.copy if case.by_row else machine.scatter)
        + products(case, machine)
        + case.batch * machine.call / 2
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial]."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    x, last = x.to(dtype), memory_format(x) is not torch.contiguous_format
    shape, outputs = x.shape[2:], layer.weight_shape[0]
    bias_BO = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else None
    if len(x) == 1 and not last:
        weight_OI = buffer.written_once(layer, routing_BK, dtype).view(outputs, -1)
        in_IP = x.reshape(x.shape[1], -1)
        out_OP = torch.mm(weight_OI, in_IP) if bias_BO is None else torch.addmm(bias_BO.t(), weight_OI, in_IP)
        return out_OP.view(1, outputs, *shape)
    weights = buffer.written(layer, routing_BK, dtype)
    maps_BIP = x.movedim(1, -1).flatten(1, -2).transpose(1, 2) if last else x.flatten(2)
    positions = maps_BIP.shape[2]
    if last:
        out_BOP = x.new_empty(len(x), positions, outputs).transpose(1, 2)
    else:
        out_BOP = x.new_empty(len(x), outputs, positions)
    for in_IP, out_OP, weight in zip(maps_BIP.unbind(), out_BOP.unbind(), weights, strict=True):
        if last:
            torch.mm(in_IP.t(), weight.view(outputs, -1).t(), out=out_OP.t())
        else:
            torch.mm(weight.view(outputs, -1), in_IP, out=out_OP)
    if bias_BO is not None:
        out_BOP += bias_BO[..., None]
    out: Tensor = out_BOP.unflatten(2, shape)
    return out
