"""Putting units in their places and slices in another order, with gradients that add nothing up.

torch's own gradients of `index_copy` and of indexing copy, zero and add whole tensors; here what comes back is taken
from its place. Legend of names: B samples or experts, U = D + N units, D dynamic, N static.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from padconvert.layers.packed import Units


def transformed() -> bool:
    """Whether an export, a trace, torch.func or forward-mode differentiation looks on: they know torch's own operations
    alone."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def reordered(value: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """`value` in another order along `dim`; `inverse` undoes `order`, and takes the gradient back."""
    if transformed():
        return value.index_select(dim, order)
    taken: Tensor = _Ordered.apply(value, order, inverse, dim)  # type: ignore[no-untyped-call]
    return taken


def placed(static: Tensor, dynamic: Tensor, units: Units) -> Tensor:
    """[B, N, …] and [B, D, …], each unit in its place: [B, U, …]. Differentiable in both."""
    if transformed():
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
        return _taken(gradient, static_units), _taken(gradient, dynamic_units), None, None


def _taken(whole: Tensor, units: Tensor) -> Tensor:
    """[B, U, …] → [B, n, …]. Single entries are gathered, which is twice as fast as selecting them."""
    if whole.dim() == 3 and whole.shape[2] == 1:
        return whole[..., 0].gather(1, units.expand(len(whole), -1))[..., None]
    return whole.index_select(1, units)


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
