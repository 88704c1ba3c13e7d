"""Rows, grouped: some static rows are one plain convolution; the dynamic rows of all samples are one grouped call.

A processor computes whole blocks of rows, and a group whose rows fill none it computes slowly. So the dynamic rows of a
sample are filled up to whole blocks with static ones, which the plain convolution then does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.packed import Units
from padconvert.layers.paths import pieces, rows
from padconvert.layers.paths.call import by_sample
from padconvert.layers.paths.case import Case, case_of
from padconvert.layers.paths.cost import Machine, convolutions, grouping, machine_of, mixing, placing
from padconvert.layers.paths.parts import dynamic_part, mix, static_part
from padconvert.layers.paths.piecewise import Weights
from padconvert.layers.placing import placed

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
    """With a gradient the outputs' is taken apart again, and the inputs' of both convolutions are added."""
    share = (case.n_dynamic + _filling(case)) / (case.n_dynamic + case.n_static)
    return (
        mixing(case, machine)
        + convolutions(case, machine, 1, 1 - share)
        + grouping(case, machine, share)
        + placing(case.batch * case.outputs, machine)
        + (placing(case.batch * (case.outputs + case.inputs), machine) if case.gradient else 0.0)
    )


def _filling(case: Case) -> int:
    """Static rows that fill the dynamic ones up to whole blocks; none where no static row would be left."""
    if pieces.unable(case):
        return 0
    missing = -case.n_dynamic % machine_of(case.device).block
    return missing if missing < case.n_static else 0


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, case, units = layer.route(x), case_of(layer, x), layer.units("weight")
    x, filling = x.to(case.dtype), _filling(case)
    if pieces.unable(case):
        dynamic = by_sample(layer, x, *rows.dynamic_rows(layer, routing_BK, x.dtype))
    else:
        dynamic = _in_pieces(layer, x, routing_BK, filling)
    filled = Units(torch.cat([units.dynamic, units.static[:filling]]), units.static[filling:]) if filling else units
    return placed(rows.static_rows(layer, x, filling), dynamic, filled)


def _in_pieces(layer: PadConv, x: Tensor, routing_BK: Tensor, filling: int) -> Tensor:
    """The dynamic rows, and after them the first `filling` static ones: [B, D + filling, *spatial']."""
    share_BK, experts_KDS = pieces.shared_experts(layer, routing_BK)
    bias_BO = _bias(layer, routing_BK, filling).to(x.dtype) if layer.has_bias else None
    static_NS = static_part(layer, "weight")
    if not filling or static_NS is None:
        return pieces.in_pieces(layer, x, Weights(share_BK, experts_KDS, None, None, None), bias_BO)
    places = torch.arange(experts_KDS.shape[1] + filling, device=x.device).split([experts_KDS.shape[1], filling])
    return pieces.in_pieces(layer, x, Weights(share_BK, experts_KDS, static_NS[:filling], *places), bias_BO)


def _bias(layer: PadConv, routing_BK: Tensor, filling: int) -> Tensor:
    static_NS, dynamic_KDS = static_part(layer, "bias"), dynamic_part(layer, "bias")
    assert static_NS is not None
    assert dynamic_KDS is not None
    filled_BNS = static_NS[:filling].expand(len(routing_BK), -1, -1)
    return torch.cat([mix(layer, dynamic_KDS, routing_BK), filled_BNS], 1)[..., 0]
