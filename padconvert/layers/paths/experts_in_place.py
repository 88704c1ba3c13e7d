"""Experts for inference: each expert's output is written where it belongs, and no expert is assembled beside others.

What `experts` computes, with one copy of the hidden state in place of six. Without autograd only: it writes to what
it has handed on. Legend of names as there; N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.words import Granularity

if TYPE_CHECKING:
    from padconvert.layers.ffn import PadLinearMember
    from padconvert.layers.linear import PadLinear
    from padconvert.layers.paths.experts import Routed

#: expert number → its weight [O, I] and bias [O]; the next call may overwrite what it gave
Expert = Callable[[int], tuple[Tensor, Tensor | None]]


def possible(x: Tensor) -> bool:
    """Whether nothing differentiates, traces or casts this call."""
    tracing = torch.compiler.is_exporting() or torch.compiler.is_compiling()
    return not (torch.is_grad_enabled() or tracing or torch.is_autocast_enabled(x.device.type))


def widen(layer: PadLinearMember, x_TI: Tensor, call: Routed) -> Tensor:
    """[T, I] → [T, J · O], or with `neuron` [T, S + J · D]."""
    static = _static_rows(layer, x_TI.dtype)
    n_static = 0 if static is None else len(static[0])
    dynamic = len(layer.units("weight").dynamic) if layer.granularity is Granularity.NEURON else layer.out_features
    hidden = x_TI.new_empty(len(x_TI), n_static + layer.top_k * dynamic)
    if static is not None:
        _linear_into(hidden[:, :n_static], x_TI, *static)
    if dynamic:
        slots_TJO = hidden[:, n_static:].unflatten(1, (layer.top_k, dynamic))
        expert = _experts_of(layer, x_TI.dtype)
        for k, token_N, slot_N in _by_expert(call, layer.num_experts):
            out_NO = torch.nn.functional.linear(x_TI.index_select(0, token_N), *expert(k))
            slots_TJO.index_put_((token_N, slot_N), out_NO)
    return hidden


def narrow(layer: PadLinearMember, x_TH: Tensor, call: Routed) -> Tensor:
    """What `widen` gave, after pointwise operations → [T, O] in the mixing dtype."""
    if layer.granularity is not Granularity.NEURON:
        out_TO = call.gates_TJ.new_zeros(len(x_TH), layer.out_features)
        return _add_weighed_(out_TO, layer, x_TH.unflatten(1, (layer.top_k, layer.in_features)), call)
    static_OS = layer.weight_static
    n_static = 0 if static_OS is None else static_OS.shape[1]
    bias_O = layer.expert_tensors("bias")[0].to(x_TH.dtype) if layer.has_bias else None
    if static_OS is None:
        out_TO = call.gates_TJ.new_zeros(len(x_TH), layer.out_features)
        out_TO = out_TO if bias_O is None else out_TO + bias_O
    else:
        weight_OS = _scaled(static_OS, layer.scales()[0], x_TH.dtype)
        out_TO = torch.nn.functional.linear(x_TH[:, :n_static], weight_OS, bias_O).to(call.gates_TJ.dtype)
    if layer.weight_dynamic is None:
        return out_TO
    return _add_weighed_(out_TO, layer, x_TH[:, n_static:].unflatten(1, (layer.top_k, -1)), call)


def project(layer: PadLinear, x_TI: Tensor, call: Routed) -> Tensor:
    """A layer on its own: [T, I] → [T, O] in the mixing dtype."""
    out_TO = call.gates_TJ.new_zeros(len(x_TI), layer.out_features)
    return _add_weighed_(out_TO, layer, x_TI[:, None].expand(-1, layer.top_k, -1), call)


def _add_weighed_(out_TO: Tensor, layer: PadLinear, x_TJI: Tensor, call: Routed) -> Tensor:
    """out += Σ_j π_j (W_j x_j + b_j)."""
    expert = _experts_of(layer, x_TJI.dtype)
    for k, token_N, slot_N in _by_expert(call, layer.num_experts):
        out_NO = torch.nn.functional.linear(x_TJI[token_N, slot_N], *expert(k)).to(out_TO.dtype)
        out_TO.index_add_(0, token_N, out_NO.mul_(call.gates_TJ[token_N, slot_N][:, None]))
    return out_TO


def _by_expert(call: Routed, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of every expert that was chosen: its number, and token and choice of each of its rows."""
    chosen_N = call.chosen_TJ.flatten()
    choices = call.chosen_TJ.shape[1]
    counts = torch.bincount(chosen_N, minlength=experts).tolist()
    for k, rows_N in enumerate(chosen_N.argsort(stable=True).split(counts)):
        if len(rows_N):
            yield k, rows_N.div(choices, rounding_mode="floor"), rows_N.remainder(choices)


def _static_rows(layer: PadLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """The rows that a `neuron` block computes once."""
    if layer.granularity is not Granularity.NEURON or layer.weight_static is None:
        return None
    scale = layer.scales()[0]
    bias = None if layer.bias_static is None else _scaled(layer.bias_static, scale, dtype)
    return _scaled(layer.weight_static, scale, dtype), bias


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
    weight_KOI, bias_KO, scale = layer.weight_dynamic, layer.bias_dynamic, layer.scales()[1]
    assert weight_KOI is not None
    return lambda k: (
        _scaled(weight_KOI[k], scale, dtype),
        None if bias_KO is None else _scaled(bias_KO[k], scale, dtype),
    )


def _rewritten(layer: PadLinear, part: str, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """One full tensor with the static units in place, over which an expert's dynamic units are written."""
    view, units = layer.view(part), layer.units(part)
    static, dynamic = getattr(layer, f"{part}_static"), getattr(layer, f"{part}_dynamic")
    static_scale, dynamic_scale = layer.scales()
    stored = static if static is not None else dynamic
    flat_US = stored.new_empty(view.units, view.size, dtype=dtype)
    if static is not None:
        flat_US.index_copy_(0, units.static, _scaled(view.cut_packed(static), static_scale, dtype))
    full = view.as_full(flat_US)

    def write(k: int) -> Tensor:
        if dynamic is not None:
            flat_US.index_copy_(0, units.dynamic, _scaled(view.cut_packed(dynamic[k]), dynamic_scale, dtype))
        return full

    return write


def _scaled(value: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """λ · value; the stored value itself where λ is folded in."""
    if isinstance(scale, float):
        return value.to(dtype)
    return (value.to(scale.dtype) * scale).to(dtype)
