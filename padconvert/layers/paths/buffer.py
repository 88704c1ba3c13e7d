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

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, mixing, placing
from padconvert.layers.paths.parts import dynamic_part, mixed, static_part
from padconvert.layers.placing import memory_format, place_

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
    if not case.plain_tensor:
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
    x = x.to(dtype)
    biases = mixed(layer, "bias", routing_BK).to(dtype) if layer.has_bias else None
    if len(x) == 1:
        weight = written_once(layer, routing_BK, dtype)
        return convolution(layer, x, weight, None if biases is None else biases[0], layer.groups)
    weights = written(layer, routing_BK, dtype)
    out: Tensor | None = None
    for at, weight in enumerate(weights):
        bias = None if biases is None else biases[at]
        one = convolution(layer, x[at : at + 1], weight, bias, layer.groups)
        if out is None:
            shape = (len(x), *one.shape[1:])
            out = torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=memory_format(one))
        out[at] = one[0]
    assert out is not None
    return out


def written(layer: PadConv, routing_BK: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The layer's buffer [*weight_shape], once for every sample, with that sample's dynamic units in it."""
    kept = _kept(layer, dtype, packed=False)
    for mixed_DS in _mixes(layer, kept, routing_BK):
        place_(kept.cut_US, mixed_DS.to(dtype), kept.units)
        yield kept.weight


def written_once(layer: PadConv, routing_1K: Tensor, dtype: torch.dtype) -> Tensor:
    """As `written`, for a single sample, where every microsecond of Python shows."""
    kept = _kept(layer, dtype, packed=False)
    mixed_DS = _straight(layer, kept, routing_1K)
    if mixed_DS is None:
        return next(written(layer, routing_1K, dtype))
    place_(kept.cut_US, mixed_DS, kept.units)
    return kept.weight


def written_packed(layer: PadConv, routing_BK: Tensor, dtype: torch.dtype) -> tuple[Iterator[Tensor], Tensor]:
    """As `written`, but of whole rows, the static ones first; and where each row of the weight lies there.

    A single sample is mixed straight into its place.
    """
    kept = _kept(layer, dtype, packed=True)
    if len(routing_BK) == 1 and _straight(layer, kept, routing_BK) is not None:
        return iter((kept.weight,)), kept.places
    tail_DS = kept.cut_US[len(kept.cut_US) - len(kept.units) :]

    def weights() -> Iterator[Tensor]:
        for mixed_DS in _mixes(layer, kept, routing_BK):
            tail_DS.copy_(mixed_DS)
            yield kept.weight

    return weights(), kept.places


def _straight(layer: PadConv, kept: _Kept, routing_1K: Tensor) -> Tensor | None:
    """Σ_k π_k D_k of one sample, [D, S], in memory that is there already: the end of a packed weight, or a place of its
    own. One row by a matrix would run on one thread, so it is cut into as many as there are. None where the dtypes,
    the scales or autocast ask for more."""
    parts = kept.parts
    if parts is None or routing_1K.dtype != parts.experts_TKF.dtype:
        return None
    if torch.is_autocast_enabled(routing_1K.device.type):
        return None
    if layer._parameters["scale_logit"] is not None:
        routing_1K = routing_1K * layer.scales()[1]
    torch.bmm(routing_1K.expand(len(parts.experts_TKF), 1, -1), parts.experts_TKF, out=parts.mixed_T1F)
    return parts.mixed_DS


def _mixes(layer: PadConv, kept: _Kept, routing_BK: Tensor) -> Iterator[Tensor]:
    """Σ_k π_k D_k of every sample, [D, S] in the mixing dtype, for a few samples at a time."""
    experts_KF = kept.experts_KF if kept.experts_KF is not None else _experts(layer)
    size = max(PIECE // (experts_KF.element_size() * experts_KF.shape[1]), 1)
    if layer._parameters["scale_logit"] is not None:
        routing_BK = routing_BK * layer.scales()[1]
    width = kept.cut_US.shape[1]
    for piece_BK in (routing_BK,) if len(routing_BK) <= size else routing_BK.split(size):
        with without_autocast(experts_KF):
            mixed_BF = piece_BK.to(experts_KF.dtype) @ experts_KF
        yield from mixed_BF.view(len(piece_BK), -1, width)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The experts cut for T threads, and where their mix goes: `mixed_DS` and `mixed_T1F` are the same memory."""

    experts_TKF: Tensor
    mixed_T1F: Tensor
    mixed_DS: Tensor

    @staticmethod
    def of(experts_KF: Tensor, mixed_DS: Tensor) -> _Parts:
        threads, total = torch.get_num_threads(), experts_KF.shape[1]
        threads = 1 if total % threads else threads
        parts_TKF = experts_KF.view(-1, threads, total // threads).transpose(0, 1)
        return _Parts(parts_TKF, mixed_DS.view(threads, 1, -1), mixed_DS)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A filled buffer and what it was filled from. `sources` share the memory of the layer's tensors, so that no other
    tensor can come to lie at their address; `some` is a copy of a few static entries, `watched` sees them.

    `units` are the dynamic ones; `places` says where each unit lies if the static ones come first.
    `experts_KF` are the layer's own dynamic values, not a copy, and `parts` a view of them; None where they are not in
    the mixing dtype, or the buffer is not.
    """

    weight: Tensor
    cut_US: Tensor
    units: Tensor
    places: Tensor
    experts_KF: Tensor | None
    parts: _Parts | None
    sources: tuple[Tensor, ...]
    state: tuple[object, ...]
    watched: Tensor | None
    some: Tensor | None

    def holds(self, sources: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        """Whether the buffer still is what `sources` would fill it with."""
        return (
            self.weight.dtype == dtype
            and self.state == _state(sources)
            and (self.watched is None or self.some is None or torch.equal(self.watched, self.some))
        )


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[PadLayer, dict[bool, _Kept]] = weakref.WeakKeyDictionary()


_buffers = _Buffers()


def _sources(layer: PadLayer) -> tuple[Tensor, ...]:
    parameters = layer._parameters  # past `__getattr__`, which takes as long as a small product
    found = (
        parameters["weight_static"], parameters["scale_logit"], layer._buffers["_weight_dynamic_units"],
        parameters["weight_dynamic"],
    )  # fmt: skip
    return tuple(each for each in found if each is not None)


def _state(sources: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Where each lies and how often it was written; tensors made under `inference_mode` do not count that. The dynamic
    units, the last, may be written: they are read on every call."""
    last = len(sources) - 1
    return tuple(
        (each.data_ptr(), -1 if at == last or each.is_inference() else each._version) for at, each in enumerate(sources)
    )


def _kept(layer: PadLayer, dtype: torch.dtype, packed: bool) -> _Kept:
    """The layer's buffer with its static units in place, or first; the dynamic ones hold anything."""
    sources, both = _sources(layer), _buffers.kept.get(layer)
    kept = None if both is None else both.get(packed)
    if kept is not None and kept.holds(sources, dtype):
        return kept
    kept = _filled(layer, dtype, sources, packed)
    if not any(each.is_inference() for each in sources):
        _buffers.kept.setdefault(layer, {})[packed] = kept
    return kept


def _filled(layer: PadLayer, dtype: torch.dtype, sources: tuple[Tensor, ...], packed: bool) -> _Kept:
    with torch.inference_mode(False), torch.no_grad():
        view, units, static_NS = layer.view("weight"), layer.units("weight"), static_part(layer, "weight")
        weight = sources[0].new_zeros(layer.weight_shape, dtype=dtype)
        cut_US = weight.view(view.units, view.size)
        watched = None
        if static_NS is not None:
            where = torch.arange(len(units.static), device=weight.device) if packed else units.static
            place_(cut_US, static_NS.to(dtype), where)
            flat = sources[0].detach().view(-1)
            watched = flat[:: max(len(flat) // COMPARED, 1)]
        experts_KF = _experts(layer)
        own = experts_KF.data_ptr() == sources[-1].data_ptr()
        parts = None
        if own and dtype == experts_KF.dtype:
            first = len(units.static)
            parts = _Parts.of(experts_KF, cut_US[first:] if packed else torch.empty_like(cut_US[first:]))
        return _Kept(
            weight, cut_US, units.dynamic, torch.cat([units.static, units.dynamic]).argsort(),
            experts_KF if own else None, parts, tuple(each.detach() for each in sources),
            _state(sources), watched, None if watched is None else watched.clone(),
        )  # fmt: skip


def _experts(layer: PadLayer) -> Tensor:
    dynamic_KDS = dynamic_part(layer, "weight")
    assert dynamic_KDS is not None
    return dynamic_KDS.detach().flatten(1)
