"""Rows, grouped: the static rows are one plain convolution; the dynamic rows of all samples are one grouped call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.paths import rows
from padconvert.layers.paths.call import by_sample
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, grouping, mixing, placing
from padconvert.layers.paths.parts import placed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if not case.rows_apart:
        return "only for whole rows that read the same inputs"
    if not case.n_static:
        return "no row of the layer is static"
    return ""


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + convolutions(case, machine, 1, 1 - case.dynamic_share)
        + grouping(case, machine, case.dynamic_share)
        + placing(case.batch * case.outputs, machine)
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, x = layer.route(x), x.to(compute_dtype(x))
    dynamic = by_sample(layer, x, *rows.dynamic_rows(layer, routing_BK, x.dtype))
    return placed(rows.static_rows(layer, x), dynamic, layer.units("weight"))
