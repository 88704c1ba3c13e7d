"""Experts for inference: each expert's output is written where it belongs, and no expert is assembled beside others.

What `experts` computes; beside the hidden state it holds one copy of its dynamic part, sorted by expert. Without
autograd only: it writes to what it has handed on. Legend of names as there; N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths import grouped
from padconvert.layers.paths.parts import scaled
from padconvert.words import Granularity

if TYPE_CHECKING:
    from padconvert.layers.ffn import PadLinearMember
    from padconvert.layers.linear import PadLinear
    from padconvert.layers.paths.experts import Routed

#: expert number → its weight [O, I] and bias [O]; the next call may overwrite what it gave
Expert = Callable[[int], tuple[Tensor, Tensor | None]]


def possible(x: Tensor) -> bool:
    """Whether nothing differentiates, traces or casts this call, and no grouped product serves it better."""
    tracing = torch.compiler.is_exporting() or torch.compiler.is_compiling()
    return not (torch.is_grad_enabled() or tracing or torch.is_autocast_enabled(x.device.type) or grouped.serves(x))


def widen(layer: PadLinearMember, x_TI: Tensor, call: Routed) -> Tensor:
    """[T, I] → [T, J · O], or with `neuron` [T, S + J · D]."""
    static = _static_rows(layer, x_TI.dtype)
    n_static = 0 if static is None else len(static[0])
    dynamic = len(layer.units("weight").dynamic) if layer.granularity is Granularity.NEURON else layer.out_features
    hidden = x_TI.new_empty(len(x_TI), n_static + layer.top_k * dynamic)
    if static is not None:
        _linear_into(hidden[:, :n_static], x_TI, *static)
    if dynamic:
        expert = _experts_of(layer, x_TI.dtype)
        rows = call.by_expert
        out_ND = x_TI.new_empty(len(rows.order_N), dynamic)
        for k, (given, out) in rows.chosen(x_TI.index_select(0, rows.token_N), out_ND):
            _linear_into(out, given, *expert(k))
        slots, places_TJ = hidden[:, n_static:].split(dynamic, 1), rows.inverse_N.unflatten(0, (-1, rows.choices))
        for slot, place_T in zip(slots, places_TJ.unbind(1), strict=True):
            torch.index_select(out_ND, 0, place_T, out=slot)
    return hidden


def narrow(layer: PadLinearMember, x_TH: Tensor, call: Routed) -> Tensor:
    """What `widen` gave, after pointwise operations → [T, O] in the mixing dtype."""
    if layer.granularity is not Granularity.NEURON:
        out_TO = call.gates_TJ.new_zeros(len(x_TH), layer.out_features)
        return _add_chosen_(out_TO, layer, x_TH, 0, call)
    static_OS = layer.weight_static
    n_static = 0 if static_OS is None else static_OS.shape[1]
    bias_O = layer.expert_tensors("bias")[0].to(x_TH.dtype) if layer.has_bias else None
    if static_OS is None:
        out_TO = call.gates_TJ.new_zeros(len(x_TH), layer.out_features)
        out_TO = out_TO if bias_O is None else out_TO + bias_O
    else:
        weight_OS = scaled(static_OS, layer.scales()[0], x_TH.dtype)
        out_TO = torch.nn.functional.linear(x_TH[:, :n_static], weight_OS, bias_O).to(call.gates_TJ.dtype)
    return out_TO if layer.weight_dynamic is None else _add_chosen_(out_TO, layer, x_TH, n_static, call)


def project(layer: PadLinear, x_TI: Tensor, call: Routed) -> Tensor:
    """A layer on its own: [T, I] → [T, O] in the mixing dtype."""
    out_TO = call.gates_TJ.new_zeros(len(x_TI), layer.out_features)
    return _add_weighed_(out_TO, layer, x_TI, call.by_expert.token_N, call)


def _add_chosen_(out_TO: Tensor, layer: PadLinear, x_TH: Tensor, n_static: int, call: Routed) -> Tensor:
    """out += Σ_j π_j (W_j x_j + b_j), where x_j is the j-th of the runs that a token has after its static units."""
    x_TH = x_TH.contiguous()
    runs, run_N = _runs(x_TH, n_static, (x_TH.shape[1] - n_static) // layer.top_k, call)
    return _add_weighed_(out_TO, layer, runs, run_N, call)


def _add_weighed_(out_TO: Tensor, layer: PadLinear, given: Tensor, row_N: Tensor, call: Routed) -> Tensor:
    """out += Σ_j π_j (W_j x_j + b_j), where the x_j are the rows of `given` that `row_N` names, by expert."""
    expert, by_expert = _experts_of(layer, given.dtype), call.by_expert
    gates_N1 = call.gates_TJ.flatten().index_select(0, by_expert.order_N)[:, None]
    for k, (rows, tokens, gates) in by_expert.chosen(row_N, by_expert.token_N, gates_N1):
        out_NO = torch.nn.functional.linear(given.index_select(0, rows), *expert(k)).to(out_TO.dtype)
        out_TO.index_add_(0, tokens, out_NO.mul_(gates))
    return out_TO


def _runs(hidden_TH: Tensor, n_static: int, dynamic: int, call: Routed) -> tuple[Tensor, Tensor]:
    """Every run of `dynamic` entries in the hidden state, by where it begins; and which of them the sorted rows are.

    Runs overlap, those of the rows do not. A copy of whole runs is several times as fast as one by token and choice.
    """
    begins = max(hidden_TH.numel() - dynamic + 1, 0)
    rows = call.by_expert
    choice_N = rows.order_N - rows.token_N * rows.choices
    return hidden_TH.as_strided((begins, dynamic), (1, 1)), (
        rows.token_N * hidden_TH.shape[1] + choice_N * dynamic + n_static
    )


def _static_rows(layer: PadLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """The rows that a `neuron` block computes once."""
    if layer.granularity is not Granularity.NEURON or layer.weight_static is None:
        return None
    scale = layer.scales()[0]
    bias = None if layer.bias_static is None else scaled(layer.bias_static, scale, dtype)
    return scaled(layer.weight_static, scale, dtype), bias


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _experts_of(layer: PadLinear, dtype: torch.dtype) -> Expert:
    """Weights by expert: with `neuron` the stored slices, else one whole weight that each expert is written over."""
    if layer.granularity is not Granularity.NEURON:
        weight_of = _rewritten(layer, "weight", dtype)
        bias_of = _rewritten(layer, "bias", dtype) if layer.has_bias else None
        return lambda k: (weight_of(k), None if bias_of is None else bias_of(k))
    assert layer.weight_dynamic is not None
    weights, scale = layer.weight_dynamic.unbind(), layer.scales()[1]
    biases = None if layer.bias_dynamic is None else layer.bias_dynamic.unbind()
    return lambda k: (scaled(weights[k], scale, dtype), None if biases is None else scaled(biases[k], scale, dtype))


def _rewritten(layer: PadLinear, part: str, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """One full tensor with the static units in place, over which an expert's dynamic units are written."""
    view, units = layer.view(part), layer.units(part)
    static, dynamic = getattr(layer, f"{part}_static"), getattr(layer, f"{part}_dynamic")
    static_scale, dynamic_scale = layer.scales()
    stored = static if static is not None else dynamic
    flat_US = stored.new_empty(view.units, view.size, dtype=dtype)
    if static is not None:
        flat_US.index_copy_(0, units.static, scaled(view.cut_packed(static), static_scale, dtype))
    full = view.as_full(flat_US)

    def write(k: int) -> Tensor:
        if dynamic is not None:
            flat_US.index_copy_(0, units.dynamic, scaled(view.cut_packed(dynamic[k]), dynamic_scale, dtype))
        return full

    return write
