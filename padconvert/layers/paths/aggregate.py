"""Aggregate: build W(b) for every sample by one matmul over the dynamic units, then one grouped call for the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.paths.call import by_sample
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, grouping, mixing, whole_weights
from padconvert.layers.paths.parts import mixed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can, which is always."""
    del case
    return ""


def seconds(case: Case, machine: Machine) -> float:
    return mixing(case, machine) + whole_weights(case, machine) + grouping(case, machine)


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """A grouped convolution whose groups are the samples: [B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    bias = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else None
    return by_sample(layer, x.to(dtype), mixed(layer, "weight", routing_BK).to(dtype), bias)


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
