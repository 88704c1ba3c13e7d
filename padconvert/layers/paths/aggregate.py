"""Aggregate: build W(b) for every sample by one matmul over the dynamic units, then one grouped call for the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.paths.call import by_sample
from padconvert.layers.paths.case import Case, case_of
from padconvert.layers.paths.cost import Machine, grouping, mixing, placing, whole_weights
from padconvert.layers.paths.parts import mixed, ordered, side_by_side

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can, which is always."""
    del case
    return ""


def seconds(case: Case, machine: Machine) -> float:
    put_together = whole_weights(case, machine)
    if _orders_outputs(case):
        rows = case.entries - case.dynamic_entries
        put_together = case.batch * rows * machine.copy + placing(case.batch * case.outputs, machine)
    return mixing(case, machine) + put_together + grouping(case, machine)


def _orders_outputs(case: Case) -> bool:
    """Whether it is cheaper to bring the outputs into order than the weights of every sample."""
    return case.rows_apart and case.n_static > 0 and case.n_dynamic > 0 and case.outputs < case.entries


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """A grouped convolution whose groups are the samples: [B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, case = layer.route(x), case_of(layer, x)
    apart = _orders_outputs(case)
    put = side_by_side if apart else mixed
    bias = put(layer, "bias", routing_BK).to(case.dtype) if layer.has_bias else None
    out = by_sample(layer, x.to(case.dtype), put(layer, "weight", routing_BK).to(case.dtype), bias)
    return ordered(out, layer.units("weight")) if apart else out


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
