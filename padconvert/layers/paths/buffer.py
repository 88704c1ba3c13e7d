"""Buffer: inference only. One weight a layer is kept, static units in place; a sample writes its dynamic units into it.

At batch 1 this is the static layer plus the mixing. The buffer is private to a thread and hangs on no layer, so a
state dict, a copy and a pickle know nothing of it; it goes when its layer does. It is filled again when the weights,
the dynamic_mask, the scales, the dtype or the device are other than they were (`_Kept.holds`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, mixing, placing
from padconvert.layers.paths.parts import dynamic_part, memory_format, mix, mixed, place_, static_part

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.pad import PadLayer

#: entries of the static part that are compared on every call, for writers that go round torch's version counter
COMPARED = 64
#: a batch is mixed in pieces of about this many bytes, so that a sample's mix is still in the cache when it is used
PIECE = 4 << 20


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    if case.gradient:
        return "autograd keeps the weights of a call, and this path overwrites them"
    if case.compiled or not case.plain_tensor:
        return "a traced program cannot keep a buffer"
    return "" if case.device == "cpu" else "streams of a device would share the buffer"


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + case.batch * case.dynamic_entries * (machine.copy if case.by_row else machine.scatter)
        + convolutions(case, machine, case.batch)
        + placing(case.batch * case.outputs * (case.batch > 1), machine)
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    weight, x = _weight(layer, dtype), x.to(dtype)
    biases = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else [None] * len(x)
    weights = _written(layer, weight, routing_BK)
    calls = zip(x.split(1), weights, biases, strict=True)
    if len(x) == 1:
        return convolution(layer, *next(calls), layer.groups)
    out: Tensor | None = None
    for at, call in enumerate(calls):
        one = convolution(layer, *call, layer.groups)
        if out is None:
            shape = (len(x), *one.shape[1:])
            out = torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=memory_format(one))
        out[at] = one[0]
    assert out is not None
    return out


def _written(layer: PadConv, weight: Tensor, routing_BK: Tensor) -> Iterator[Tensor]:
    """The buffer, once for every sample, with that sample's dynamic units in it."""
    view, units = layer.view("weight"), layer.units("weight").dynamic
    dynamic_KDS = dynamic_part(layer, "weight")
    assert dynamic_KDS is not None
    size = max(PIECE // (dynamic_KDS.element_size() * dynamic_KDS[0].numel()), 1)
    cut_US = weight.view(view.units, view.size)
    for piece_BK in routing_BK.split(size):
        for mixed_DS in mix(layer, dynamic_KDS, piece_BK).to(weight.dtype):
            place_(cut_US, mixed_DS, units)
            yield weight


@dataclass(frozen=True, slots=True)
class _Kept:
    """A filled buffer and what it was filled from. `sources` share the memory of the layer's tensors, so that no other
    tensor can come to lie at their address."""

    weight: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    some: Tensor | None

    def holds(self, sources: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        """Whether the buffer still is what `sources` would fill it with."""
        return (
            self.weight.dtype == dtype
            and self.versions == _versions(sources)
            and all(a.data_ptr() == b.data_ptr() for a, b in zip(self.sources, sources, strict=True))
            and (self.some is None or torch.equal(self.some, _some(sources[0])))
        )


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[PadLayer, _Kept] = weakref.WeakKeyDictionary()


_buffers = _Buffers()


def _sources(layer: PadLayer) -> tuple[Tensor, ...]:
    found = (layer.weight_static, layer.scale_logit, layer.units("weight").dynamic)
    return tuple(each for each in found if each is not None)


def _versions(sources: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was written; tensors made under `inference_mode` do not count, and give −1."""
    return tuple(-1 if each.is_inference() else each._version for each in sources)


def _some(static: Tensor) -> Tensor:
    flat = static.detach().view(-1)
    return flat[:: max(len(flat) // COMPARED, 1)]


def _weight(layer: PadLayer, dtype: torch.dtype) -> Tensor:
    """The layer's buffer, [*weight_shape], with its static units in place; the dynamic ones hold anything."""
    sources, kept = _sources(layer), _buffers.kept.get(layer)
    if kept is not None and len(kept.sources) == len(sources) and kept.holds(sources, dtype):
        return kept.weight
    with torch.inference_mode(False), torch.no_grad():
        view, static_NS = layer.view("weight"), static_part(layer, "weight")
        weight = sources[0].new_zeros(layer.weight_shape, dtype=dtype)
        if static_NS is not None:
            place_(weight.view(view.units, view.size), static_NS.to(dtype), layer.units("weight").static)
    uncounted = any(each.is_inference() for each in sources)
    if not uncounted:
        some = None if layer.weight_static is None else _some(sources[0]).clone()
        held = tuple(each.detach() for each in sources)
        _buffers.kept[layer] = _Kept(weight, held, _versions(sources), some)
    return weight
