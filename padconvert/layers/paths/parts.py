"""What the paths compute with: the packed parts in the mixing dtype, mixed for every sample, put in their places.

No path builds K full copies of a weight. Since Σπ = 1 only the dynamic units are mixed; the static ones are placed.

Legend of names: B samples, K experts, U = D + N units, D dynamic, N static, S entries of a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.packed import Units

if TYPE_CHECKING:
    from padconvert.layers.pad import PadLayer


def static_part(layer: PadLayer, part: str) -> Tensor | None:
    """λ_s W_s, [N, S] in the mixing dtype; None where nothing is static."""
    static = getattr(layer, f"{part}_static")
    if static is None:
        return None
    cut_NS = layer.view(part).cut_packed(static).to(layer.mixing_dtype)
    return cut_NS if layer.scale_logit is None else cut_NS * layer.scales()[0]


def dynamic_part(layer: PadLayer, part: str) -> Tensor | None:
    """D without its scale, [K, D, S] in the mixing dtype; None where nothing is dynamic."""
    dynamic = getattr(layer, f"{part}_dynamic")
    return None if dynamic is None else layer.view(part).cut_packed(dynamic).to(layer.mixing_dtype)


def scaled(value: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """λ · value; the stored value itself where λ is folded in."""
    if isinstance(scale, float):
        return value.to(dtype)
    return (value.to(scale.dtype) * scale).to(dtype)


def mix(layer: PadLayer, dynamic_KDS: Tensor, routing_BK: Tensor) -> Tensor:
    """λ_d Σ_k π_k(b) D_k for every sample, [B, D, S] in the mixing dtype."""
    share_BK = routing_BK.to(dynamic_KDS.dtype)
    if layer.scale_logit is not None:
        share_BK = share_BK * layer.scales()[1]
    with without_autocast(dynamic_KDS):
        return (share_BK @ dynamic_KDS.flatten(1)).view(routing_BK.shape[0], *dynamic_KDS.shape[1:])


def mixed(layer: PadLayer, part: str, routing_BK: Tensor) -> Tensor:
    """W(b) for every sample: [B, *shape] in the mixing dtype."""
    static_NS, dynamic_KDS = static_part(layer, part), dynamic_part(layer, part)
    batch = routing_BK.shape[0]
    if dynamic_KDS is None:
        assert static_NS is not None
        whole_BUS = static_NS.expand(batch, -1, -1)
    elif static_NS is None:
        whole_BUS = mix(layer, dynamic_KDS, routing_BK)
    else:
        whole_BUS = placed(static_NS.expand(batch, -1, -1), mix(layer, dynamic_KDS, routing_BK), layer.units(part))
    return layer.view(part).as_full(whole_BUS)


def side_by_side(layer: PadLayer, part: str, routing_BK: Tensor) -> Tensor:
    """W(b) of rows for every sample, the static ones first: [B, N + D, *row] in the mixing dtype."""
    static_NS, dynamic_KDS = static_part(layer, part), dynamic_part(layer, part)
    assert static_NS is not None
    assert dynamic_KDS is not None
    batch = routing_BK.shape[0]
    both_BUS = torch.cat([static_NS.expand(batch, -1, -1), mix(layer, dynamic_KDS, routing_BK)], 1)
    return layer.view(part).as_full(both_BUS)


def ordered(packed: Tensor, units: Units) -> Tensor:
    """[B, N + D, …], the static units first, each unit in its place: [B, U, …]."""
    order = torch.cat([units.static, units.dynamic])
    return reordered(packed, order.argsort(), order, 1)


def reordered(value: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """`value` in another order along `dim`; `inverse` undoes `order`, and takes the gradient back."""
    taken: Tensor = _Ordered.apply(value, order, inverse, dim)  # type: ignore[no-untyped-call]
    return taken


def placed(static: Tensor, dynamic: Tensor, units: Units) -> Tensor:
    """[B, N, …] and [B, D, …], each unit in its place: [B, U, …]. Differentiable in both."""
    if torch.compiler.is_exporting():
        both = torch.cat([static, dynamic], 1)
        return torch.zeros_like(both).index_copy(1, torch.cat([units.static, units.dynamic]), both)
    whole: Tensor = _Placed.apply(static, dynamic, units.static, units.dynamic)  # type: ignore[no-untyped-call]
    return whole


def place_(whole_U: Tensor, part_D: Tensor, units_D: Tensor) -> None:
    """Write units, [D, …], into their places of `whole_U`, [U, …]. Single entries are scattered, which is twice as
    fast as copying them by index."""
    if part_D.dim() == 2 and part_D.shape[1] == 1 and whole_U.is_contiguous():
        whole_U.view(-1).scatter_(0, units_D, part_D.reshape(-1))
    else:
        whole_U.index_copy_(0, units_D, part_D)


class _Placed(torch.autograd.Function):
    """As two `index_copy`, without the copies of what they overwrite, forward and backward."""

    @staticmethod
    def forward(ctx: Any, static: Tensor, dynamic: Tensor, static_units: Tensor, dynamic_units: Tensor) -> Tensor:
        ctx.save_for_backward(static_units, dynamic_units)
        total = len(static_units) + len(dynamic_units)
        out = _empty(dynamic, total)
        for part, units in ((static, static_units), (dynamic, dynamic_units)):
            if part.dim() == 3 and part.shape[2] == 1:
                out.view(len(out), total).scatter_(1, units.expand(len(out), -1), part[..., 0])
            else:
                out.index_copy_(1, units, part)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        static_units, dynamic_units = ctx.saved_tensors
        return gradient.index_select(1, static_units), gradient.index_select(1, dynamic_units), None, None


class _Ordered(torch.autograd.Function):
    """Slices in another order. The gradient goes back by the inverse order, where indexing's own would add them up."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return value.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(ctx.dim, inverse), None, None, None


def _empty(like: Tensor, total: int) -> Tensor:
    """[B, total, …], in the memory format of `like` [B, D, …]."""
    shape = (like.shape[0], total, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where `x` is held so and not plainly, as torch's layers keep it."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format
