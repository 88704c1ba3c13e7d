"""Rows: the static rows are one plain convolution of the whole batch; the dynamic rows are one for every sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, mixing, placing
from padconvert.layers.paths.parts import dynamic_part, mix, static_part
from padconvert.layers.placing import placed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if not case.rows_apart:
        return "only for whole rows that read the same inputs"
    if not case.n_static:
        return "no row of the layer is static"
    return "a compiled program would hold one convolution for every sample" if case.compiled else ""


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + convolutions(case, machine, 1, 1 - case.dynamic_share)
        + convolutions(case, machine, case.batch, case.dynamic_share)
        + placing(round(case.batch * case.outputs * case.dynamic_share), machine)
        + placing(case.batch * case.outputs, machine)
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, x = layer.route(x), x.to(compute_dtype(x))
    weights, biases = dynamic_rows(layer, routing_BK, x.dtype)
    per_sample = [None] * len(x) if biases is None else biases.unbind()
    calls = zip(x.split(1), weights.unbind(), per_sample, strict=True)
    dynamic = torch.cat([convolution(layer, *call, 1) for call in calls])
    return placed(static_rows(layer, x), dynamic, layer.units("weight"))


def static_rows(layer: PadConv, x: Tensor, skipped: int = 0) -> Tensor:
    """The static rows of every sample but the first `skipped`: [B, N − skipped, *spatial']."""
    weight_NS, bias_NS = static_part(layer, "weight"), static_part(layer, "bias") if layer.has_bias else None
    assert weight_NS is not None
    bias_N = None if bias_NS is None else bias_NS[skipped:, 0]
    return convolution(layer, x, layer.view("weight").as_packed(weight_NS[skipped:]), bias_N, 1)


def dynamic_rows(layer: PadConv, routing_BK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Every sample's dynamic rows [B, D, I, *kernel] and their bias [B, D]."""
    dynamic_KDS = dynamic_part(layer, "weight")
    assert dynamic_KDS is not None
    weight = layer.view("weight").as_packed(mix(layer, dynamic_KDS, routing_BK)).to(dtype)
    if not layer.has_bias:
        return weight, None
    bias_KDS = dynamic_part(layer, "bias")
    assert bias_KDS is not None
    return weight, mix(layer, bias_KDS, routing_BK)[..., 0].to(dtype)
