"""Experts: compute the chosen experts of every token, and nothing else; whole feed-forward blocks and single layers.

Tokens are sorted by expert, so that each expert is one matrix product. An exported program cannot have sizes that
depend on the routing: there every expert sees every token, and what was not chosen weighs nothing.

Legend of names: T tokens, J = top_k chosen experts, K experts, I inputs, O outputs, S static and D dynamic units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths import aggregate, experts_in_place, grouped
from padconvert.layers.paths.dispatch import Dispatch
from padconvert.layers.paths.parts import scaled
from padconvert.layers.placing import reordered
from padconvert.words import Granularity, Routing

if TYPE_CHECKING:
    from padconvert.layers.ffn import PadLinearMember
    from padconvert.layers.linear import PadLinear


@dataclass(frozen=True)
class Routed:
    """How the tokens of one call are routed. `lead` is the input's shape but for its last dimension.

    `routing` is [T, K] (all experts, zero where not chosen), or [B, K] where weights are merged by sequence.
    """

    lead: tuple[int, ...]
    routing: Tensor
    gates_TJ: Tensor
    chosen_TJ: Tensor

    @cached_property
    def by_expert(self) -> Dispatch:
        """The rows of the call, sorted when the first member asks."""
        return Dispatch.of(self.chosen_TJ, self.routing.shape[-1])


def routed(layer: PadLinear, x: Tensor) -> Routed:
    """The routing of a call on `x` [..., I]: of every token, or of its sequence and so of every token in it."""
    lead = tuple(x.shape[:-1])
    routing = layer.route(x)
    if not layer.top_k:
        none = routing.new_zeros(0, 0)
        return Routed(lead, routing, none, none.long())
    if layer.routing is Routing.SEQUENCE and x.dim() > 2:
        routing = routing.reshape(lead[0], *(1,) * (len(lead) - 1), layer.num_experts).expand(*lead, layer.num_experts)
    routing_TK = routing.reshape(-1, layer.num_experts)
    gates_TJ, chosen_TJ = routing_TK.topk(layer.top_k, dim=-1)
    return Routed(lead, routing_TK, gates_TJ, chosen_TJ)


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """A layer on its own: [..., I] → [..., O], Σ_j π_j (W_j x + b_j) over the chosen experts."""
    call = routed(layer, x)
    x_TI = x.reshape(-1, layer.in_features)
    if experts_in_place.possible(x):
        return experts_in_place.project(layer, x_TI, call).to(x.dtype).reshape(*x.shape[:-1], layer.out_features)
    out_TJO = _each(layer, x_TI, call)
    return _weighed(out_TJO, call).to(out_TJO.dtype).reshape(*x.shape[:-1], layer.out_features)


def widen(layer: PadLinearMember, x: Tensor, call: Routed) -> Tensor:
    """First and peer members: [..., I] → [..., J · O]; with `neuron` [..., S + J · D]; merged [..., O]."""
    if layer.merges:
        return aggregate.project_by(layer, x, call.routing)
    x_TI = x.reshape(-1, layer.in_features)
    if experts_in_place.possible(x):
        return _placed(experts_in_place.widen(layer, x_TI, call), call)
    if layer.granularity is not Granularity.NEURON:
        return _placed(_each(layer, x_TI, call).flatten(1), call)
    parts = []
    if layer.weight_static is not None:
        parts.append(torch.nn.functional.linear(x_TI, *_static_rows(layer, x.dtype)))
    if layer.weight_dynamic is not None:
        parts.append(_every_choice(x_TI, _dynamic_rows(layer), call).flatten(1))
    return _placed(torch.cat(parts, -1), call)


def _placed(hidden_TH: Tensor, call: Routed) -> Tensor:
    return hidden_TH.reshape(*call.lead, hidden_TH.shape[-1])


def narrow(layer: PadLinearMember, x: Tensor, call: Routed) -> Tensor:
    """The last member: what `widen` gave, after pointwise operations, → [..., O]."""
    if layer.merges:
        return aggregate.project_by(layer, x, call.routing)
    x_TH = x.reshape(-1, x.shape[-1])
    if experts_in_place.possible(x):
        return experts_in_place.narrow(layer, x_TH, call).to(x.dtype).reshape(*call.lead, layer.out_features)
    if layer.granularity is not Granularity.NEURON:
        x_TJI = x_TH.reshape(x_TH.shape[0], layer.top_k, layer.in_features)
        mixed_TO = _weighed_choice(x_TJI, _experts(layer), call)
        return mixed_TO.to(x.dtype).reshape(*call.lead, layer.out_features)
    return _narrow_neurons(layer, x_TH, call).to(x.dtype).reshape(*call.lead, layer.out_features)


def _narrow_neurons(layer: PadLinearMember, x_TH: Tensor, call: Routed) -> Tensor:
    """Σ_j π_j D_j h_j over the dynamic units, and once the static ones and the bias: [T, O] in the mixing dtype."""
    n_static = 0 if layer.weight_static is None else layer.weight_static.shape[1]
    # their gradients are joined once, where those of two slices would be added up
    static_TS, dynamic_TH = x_TH.split([n_static, x_TH.shape[1] - n_static], 1)
    out_TO = x_TH.new_zeros(x_TH.shape[0], layer.out_features)
    if layer.weight_static is not None:
        out_TO = static_TS @ scaled(layer.weight_static, layer.scales()[0], x_TH.dtype).t()
    if layer.has_bias:
        out_TO = out_TO + layer.expert_tensors("bias")[0].to(x_TH.dtype)
    if layer.weight_dynamic is None:
        return out_TO
    x_TJD = dynamic_TH.reshape(x_TH.shape[0], layer.top_k, -1)
    columns = _Experts(layer.weight_dynamic, None, layer.scales()[1])
    mixed_TO = _weighed_choice(x_TJD, columns, call)
    return out_TO.to(mixed_TO.dtype) + mixed_TO


@dataclass(frozen=True, slots=True)
class _Experts:
    """W_k = `scale` · `weight_KOI[k]`, and so the biases; not yet in the dtype of a call."""

    weight_KOI: Tensor
    bias_KO: Tensor | None
    scale: Tensor | float

    def settled(self, dtype: torch.dtype) -> _Experts:
        """With the scale in the weights, of `dtype`: it is rounded once, from the dtype it is learned in."""
        bias = None if self.bias_KO is None else scaled(self.bias_KO, self.scale, dtype)
        return _Experts(scaled(self.weight_KOI, self.scale, dtype), bias, 1.0)

    def for_rows(self, rows: int, x: Tensor) -> _Experts:
        """The scale goes onto what is smaller, the weights or the outputs of so many rows of `x`; in half precision
        onto the weights."""
        smaller = rows * self.weight_KOI.shape[1] < self.weight_KOI.numel()
        if isinstance(self.scale, float) or not (smaller and _at_full_precision(x, self.scale)):
            return self.settled(x.dtype)
        bias = None if self.bias_KO is None else self.bias_KO.to(x.dtype)
        return _Experts(self.weight_KOI.to(x.dtype), bias, self.scale)

    def scaled(self, out: Tensor) -> Tensor:
        return out if isinstance(self.scale, float) else out * self.scale


def _at_full_precision(x: Tensor, scale: Tensor) -> bool:
    return x.dtype is scale.dtype and not torch.is_autocast_enabled(x.device.type)


def _static_rows(layer: PadLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    assert layer.weight_static is not None
    scale = layer.scales()[0]
    bias = None if layer.bias_static is None else scaled(layer.bias_static, scale, dtype)
    return scaled(layer.weight_static, scale, dtype), bias


def _dynamic_rows(layer: PadLinear) -> _Experts:
    assert layer.weight_dynamic is not None
    return _Experts(layer.weight_dynamic, layer.bias_dynamic, layer.scales()[1])


def _experts(layer: PadLinear) -> _Experts:
    weight, scale = layer.relative_experts("weight")
    bias = layer.relative_experts("bias")[0] if layer.has_bias else None
    return _Experts(weight, bias, scale)


def _each(layer: PadLinear, x_TI: Tensor, call: Routed) -> Tensor:
    """[T, I] → [T, J, O]: every token by each of its experts."""
    return _every_choice(x_TI, _experts(layer), call)


def _every_choice(x_TI: Tensor, experts: _Experts, call: Routed) -> Tensor:
    if torch.compiler.is_exporting():
        experts = experts.settled(x_TI.dtype)
        out_TKO = torch.einsum("ti,koi->tko", x_TI, experts.weight_KOI)
        out_TKO = out_TKO if experts.bias_KO is None else out_TKO + experts.bias_KO
        return out_TKO.gather(1, call.chosen_TJ[..., None].expand(-1, -1, out_TKO.shape[-1]))
    rows_NI = x_TI[:, None].expand(-1, call.chosen_TJ.shape[1], -1).flatten(0, 1)
    return _by_expert(rows_NI, experts, call.by_expert).reshape(*call.chosen_TJ.shape, -1)


def _weighed_choice(x_TJI: Tensor, experts: _Experts, call: Routed) -> Tensor:
    """Σ_j π_j (W_j x_j + b_j): [T, J, I] → [T, O] in the mixing dtype."""
    if torch.compiler.is_exporting():
        experts = experts.settled(x_TJI.dtype)
        place_TJK = torch.nn.functional.one_hot(call.chosen_TJ, len(experts.weight_KOI)).to(call.gates_TJ.dtype)
        gated_TKI = torch.einsum("tjk,tj,tji->tki", place_TJK, call.gates_TJ, x_TJI.to(call.gates_TJ.dtype))
        mixed_TO = torch.einsum("tki,koi->to", gated_TKI, experts.weight_KOI.to(gated_TKI.dtype))
        return mixed_TO if experts.bias_KO is None else mixed_TO + call.routing @ experts.bias_KO.to(mixed_TO.dtype)
    out_NO = _by_expert(x_TJI.flatten(0, 1), experts, call.by_expert)
    return _weighed(out_NO.reshape(*call.chosen_TJ.shape, -1), call)


def _weighed(out_TJO: Tensor, call: Routed) -> Tensor:
    """Σ_j π_j y_j in the mixing dtype."""
    with without_autocast(out_TJO):
        return (call.gates_TJ[..., None] * out_TJO.to(call.gates_TJ.dtype)).sum(1)


def _by_expert(rows_NI: Tensor, experts: _Experts, rows: Dispatch) -> Tensor:
    """Each row by its own expert: [N, I] → [N, O]. Rows are sorted by expert, so each expert is called once."""
    sorted_NI, experts = reordered(rows_NI, rows.order_N, rows.inverse_N, 0), experts.for_rows(len(rows_NI), rows_NI)
    at_once = grouped.serves(sorted_NI) and grouped.suits(experts.weight_KOI)
    product = grouped.linear if at_once else grouped.linear_by_loop
    out_NO = experts.scaled(product(sorted_NI, experts.weight_KOI, experts.bias_KO, rows))
    return reordered(out_NO, rows.inverse_N, rows.order_N, 0)
