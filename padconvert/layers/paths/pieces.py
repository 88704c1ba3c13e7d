"""Pieces: the batch in pieces whose weights a core's cache holds, each one grouped call. On a processor only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import padded, piece_size
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, grouping, mixing
from padconvert.layers.paths.parts import dynamic_part, mixed, static_part
from padconvert.layers.paths.piecewise import Call, Weights, piecewise

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if case.device != "cpu":
        return "other devices take a batch at once"
    if not case.plain_tensor:
        return "a traced program cannot write into a buffer"
    return "only for dynamic weights, padded by numbers" if isinstance(case.padding, str) or not case.n_dynamic else ""


def seconds(case: Case, machine: Machine) -> float:
    if not case.by_row:
        return mixing(case, machine) / case.dynamic_share + grouping(case, machine)
    samples = min(piece_size(case.device, case.entries, case.batch), case.batch)
    written = case.batch * case.dynamic_entries + samples * (case.entries - case.dynamic_entries)
    return mixing(case, machine) + written * machine.copy * (case.n_static > 0) + grouping(case, machine)


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    bias_BO = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else None
    if layer.view("weight").by_entry:
        # mixing an entry costs less than bringing it to its place: experts are whole
        weights = Weights(routing_BK, layer.expert_tensors("weight").flatten(2), None, None, None)
    else:
        units = layer.units("weight")
        weights = Weights(*shared_experts(layer, routing_BK), static_part(layer, "weight"), units.dynamic, units.static)
    return in_pieces(layer, x.to(dtype), weights, bias_BO)


def shared_experts(layer: PadConv, routing_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' shares [B, K] and their rows [K, D, S], one of them with the scale."""
    experts_KDS = dynamic_part(layer, "weight")
    assert experts_KDS is not None
    return routing_BK if layer.scale_logit is None else routing_BK * layer.scales()[1], experts_KDS


def in_pieces(layer: PadConv, x: Tensor, weights: Weights, bias_BO: Tensor | None) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial'], each sample by its own weight and bias."""
    wide, padding = padded(layer, x)
    assert not isinstance(padding, str)
    call = Call(layer.weight_shape[1:], layer.stride, padding, layer.dilation, layer.groups)
    with without_autocast(x):
        return piecewise(call, wide.contiguous(), bias_BO, weights)
