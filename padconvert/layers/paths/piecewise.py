"""The convolution behind `pieces`, and its gradient: weights are put together for one piece of the batch at a time.

The mixed weights of a batch are many times the layer's. Kept for the backward pass they would go through memory that
the system hands out anew for every call, which takes longer than mixing them a second time in the cache.

Legend of names: B samples, P of them in a piece, K experts, O rows, D dynamic, N static, S entries of a row,
F = D·S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.packed import Units
from padconvert.layers.paths.call import piece_size
from padconvert.layers.placing import placed

Found = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A convolution of every sample with a weight of its own, as one with a group for every sample."""

    row: Sequence[int]  # the shape of a weight's row
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def forward(self, x: Tensor, weight_POS: Tensor, bias_PO: Tensor | None) -> Tensor:
        """[P, C, *spatial] → [P, O, *spatial']."""
        bias = None if bias_PO is None else bias_PO.flatten()
        out = torch.convolution(*self._together(x, weight_POS), bias, *self._options(len(x)))
        return out.view(len(x), -1, *out.shape[2:])

    def backward(self, out: Tensor, x: Tensor, weight_POS: Tensor, mask: Sequence[bool]) -> list[Tensor | None]:
        """By the gradient of the output those of input, weights and biases, as far as `mask` asks for them."""
        together, flat = self._together(x, weight_POS), out.reshape(1, -1, *out.shape[2:])
        found = torch.ops.aten.convolution_backward(flat, *together, [flat.shape[1]], *self._options(len(x)), mask)
        shapes = (x.shape, weight_POS.shape, out.shape[:2])
        return [each.view(shape) if asked else None for each, shape, asked in zip(found, shapes, mask, strict=True)]

    def _together(self, x: Tensor, weight_POS: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(1, -1, *x.shape[2:]), weight_POS.reshape(-1, *self.row)

    def _options(self, samples: int) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), samples * self.groups


@dataclass(frozen=True, slots=True)
class Weights:
    """Of every sample [O, S]: Σ_k share_k D_k in the places of the dynamic rows, and the static rows, if there are."""

    share_BK: Tensor
    experts_KDS: Tensor
    static_NS: Tensor | None
    dynamic_rows: Tensor | None
    static_rows: Tensor | None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return self.share_BK, self.experts_KDS, self.static_NS, self.dynamic_rows, self.static_rows

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The pieces of the batch and their weights [P, O, S], each of which is gone with the next."""
        experts_KF, width, size = self.experts_KDS.flatten(1), self.experts_KDS.shape[2], self._size()
        mixed_PF = experts_KF.new_empty(size, experts_KF.shape[1])
        mixed_PDS = whole_POS = mixed_PF.view(size, -1, width)
        if self.static_NS is not None:
            assert self.static_rows is not None
            whole_POS = experts_KF.new_empty(size, mixed_PDS.shape[1] + len(self.static_NS), width)
            whole_POS.index_copy_(1, self.static_rows, self.static_NS.expand(size, -1, -1))
        for begin in range(0, len(self.share_BK), size):
            share_PK = self.share_BK[begin : begin + size]
            count = len(share_PK)
            torch.mm(share_PK, experts_KF, out=mixed_PF[:count])
            if self.dynamic_rows is not None and self.static_NS is not None:
                whole_POS[:count].index_copy_(1, self.dynamic_rows, mixed_PDS[:count])
            yield slice(begin, begin + count), whole_POS[:count]

    def _size(self) -> int:
        static = 0 if self.static_NS is None else self.static_NS.numel()
        return min(piece_size("cpu", self.experts_KDS[0].numel() + static, len(self.share_BK)), len(self.share_BK))

    def at_once(self) -> Tensor:
        """All of them, [B, O, S], differentiable."""
        mixed_BDS: Tensor = (self.share_BK @ self.experts_KDS.flatten(1)).unflatten(1, self.experts_KDS.shape[1:])
        if self.static_NS is None or self.static_rows is None or self.dynamic_rows is None:
            return mixed_BDS
        static_BNS = self.static_NS.expand(len(mixed_BDS), -1, -1)
        return placed(static_BNS, mixed_BDS, Units(self.dynamic_rows, self.static_rows))


class _Gradients:
    """Those of `weights`, gathered piece by piece."""

    def __init__(self, weights: Weights) -> None:
        self._of = weights
        self._share_BK = torch.empty_like(weights.share_BK)
        self._experts_KF = torch.zeros_like(weights.experts_KDS).flatten(1)
        self._rows_OS: Tensor | None = None

    def add(self, piece: slice, weight_POS: Tensor) -> None:
        """`weight_POS` is the gradient of a piece's weights."""
        dynamic_PDS = weight_POS
        if self._of.static_NS is not None and self._of.dynamic_rows is not None:
            summed_OS = weight_POS.sum(0)
            self._rows_OS = summed_OS if self._rows_OS is None else self._rows_OS.add_(summed_OS)
            dynamic_PDS = weight_POS.index_select(1, self._of.dynamic_rows)
        dynamic_PF = dynamic_PDS.flatten(1)
        self._experts_KF.addmm_(self._of.share_BK[piece].t(), dynamic_PF)
        torch.mm(dynamic_PF, self._of.experts_KDS.flatten(1).t(), out=self._share_BK[piece])

    def found(self) -> Found:
        static_NS = None
        if self._rows_OS is not None and self._of.static_rows is not None:
            static_NS = self._rows_OS.index_select(0, self._of.static_rows)
        return self._share_BK, self._experts_KF.view_as(self._of.experts_KDS), static_NS, None, None


def piecewise(call: Call, x: Tensor, bias_BO: Tensor | None, weights: Weights) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial'] in the dtype of `x`, by each sample's own weight and bias."""
    out: Tensor = _Piecewise.apply(call, x, bias_BO, *weights.parts)  # type: ignore[no-untyped-call]
    return out


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, bias_BO: Tensor | None, *parts: Any) -> Tensor:
        ctx.save_for_backward(x, bias_BO, *parts)
        ctx.call = call
        whole = _Whole(len(x))
        for piece, weight_POS in Weights(*parts).pieces():
            bias_PO = None if bias_BO is None else bias_BO[piece]
            whole.put(piece, call.forward(x[piece], weight_POS.to(x.dtype), bias_PO))
        assert whole.value is not None
        return whole.value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Found:
        with without_autocast(gradient):
            return (_backward_again if torch.is_grad_enabled() else _backward)(ctx, gradient)


class _Whole:
    """A batch [B, …], put together of its pieces; of a single one without a copy. None where no piece had a value."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.value: Tensor | None = None

    def put(self, piece: slice, some: Tensor | None) -> None:
        if some is None:
            return
        if len(some) == self._batch:
            self.value = some
            return
        if self.value is None:
            self.value = some.new_empty(self._batch, *some.shape[1:])
        self.value[piece] = some


def _backward(ctx: Any, gradient: Tensor) -> Found:
    x, _, *parts = ctx.saved_tensors
    _, of_x, of_bias, *of_parts = ctx.needs_input_grad
    weights, mask = Weights(*parts), (of_x, any(of_parts), of_bias)
    gathered, input_, bias = _Gradients(weights), _Whole(len(x)), _Whole(len(x))
    for piece, weight_POS in weights.pieces():
        found = ctx.call.backward(gradient[piece], x[piece], weight_POS.to(x.dtype), mask)
        input_.put(piece, found[0])
        bias.put(piece, found[2])
        if found[1] is not None:
            gathered.add(piece, found[1].to(weight_POS.dtype))
    return None, input_.value, bias.value, *(gathered.found() if mask[1] else (None,) * len(parts))


def _backward_again(ctx: Any, gradient: Tensor) -> Found:
    """The same by a plain computation, whose gradient can be differentiated."""
    x, bias_BO, *parts = ctx.saved_tensors
    out = ctx.call.forward(x, Weights(*parts).at_once().to(x.dtype), bias_BO)
    wanted = [v for v, asked in zip((None, x, bias_BO, *parts), ctx.needs_input_grad, strict=True) if asked]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
    return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)
