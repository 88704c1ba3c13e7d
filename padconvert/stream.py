"""The data-free route: a source's own weights are sorted into static and dynamic units while they are written.

Nothing is trained, so all experts are the trained weight, stored once, and the static units are its own: there is
nothing to compute but which units are the largest. So no layer is ever copied as a whole: its units are taken from
the source's pages piece by piece, once for their checksum and once for the file. The file is then held against the
source on its own pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from padconvert.checkpoint.layout import expected_tensors, join
from padconvert.checkpoint.pieces import PIECE, Content, Pieces
from padconvert.checkpoint.probe_record import fits
from padconvert.checkpoint.read import Checkpoint
from padconvert.checkpoint.save import PROBE_SAMPLES, Packed, entries_of
from padconvert.checkpoint.write import in_turn
from padconvert.errors import VerificationError
from padconvert.layers.build import Static, weight_of
from padconvert.layers.packed import Units, UnitView
from padconvert.layers.pad import PadLayer
from padconvert.load.opened import Opened
from padconvert.partition.ranking import keep_in_layer, keep_largest
from padconvert.plan import Plan
from padconvert.precision import HALF
from padconvert.results import Equality
from padconvert.rewrite import empty_layer, pad_layers, sharing_copy, swap_
from padconvert.verify import NO_INPUTS, Call, equality_by_forward, equality_by_one, probe_check
from padconvert.walk.info import Walk
from padconvert.walk.probe import ProbeSpec
from padconvert.walk.quiet import device_of
from padconvert.words import Granularity, Verdict

#: bytes of a half-precision source up to which both networks are copied to fp32, to be held against each other there
_UPCAST = 2**28
#: entries that torch goes through on the thread that asks: the others are at work on other layers
_ALONE = 2**15 - 1
_TOO_LARGE = "a copy of the source in fp32, to compare half precision in, would take too much memory"


@dataclass(slots=True)
class Stream:
    """`model` is the output with its converted layers empty, `packed` their values as they go into the file. `equal`
    is what `check_back` found."""

    model: nn.Module
    packed: Packed
    source: nn.Module
    probe: ProbeSpec | None
    calls: Sequence[Call]
    equal: Equality | None = field(default=None)

    def check_back(self, checkpoint: Checkpoint, loaded: nn.Module) -> None:
        """The first promise, held on the written file: `loaded` from it computes what the source computes, on the
        probe, whose outputs are on record, and on `calls`; or has its weights, where the source cannot be called.

        Raises VerificationError where it does not, or never calls a converted layer.
        """
        outputs: list[list[Tensor]] = []
        self.equal = self._equality(loaded, outputs)
        if not self.equal.passed:
            raise VerificationError(_unequal(self.equal))
        check = probe_check(checkpoint, loaded, outputs[0] if outputs else None)
        if not check.passed:
            raise VerificationError(
                f"The written file does not give the model back: outputs differ by {check.value}, at most "
                f"{check.limit} is allowed. Nothing was written; please report it."
            )

    def _equality(self, loaded: nn.Module, outputs: list[list[Tensor]]) -> Equality:
        """`outputs` gets those of `loaded` on the probe, where they are as its user would get them."""
        if self.probe is None and not self.calls:
            return equality_by_one(self.source, loaded, NO_INPUTS)
        probe = [] if self.probe is None else [self.probe.make(PROBE_SAMPLES, device_of(self.source))]
        calls = [*probe, *self.calls]
        if any(parameter.dtype in HALF for parameter in self.source.parameters()):
            if sum(parameter.nbytes for parameter in self.source.parameters()) > _UPCAST:
                return equality_by_one(self.source, loaded, _TOO_LARGE)
            return equality_by_forward(_in_fp32(self.source), _in_fp32(loaded), calls)
        known = {0: self.packed.outputs} if self.packed.outputs else {}
        return equality_by_forward(self.source, loaded, calls, known=known, keep=outputs if known else None)


def _in_fp32(model: nn.Module) -> nn.Module:
    """A copy whose experts still are one in memory where they were."""
    copied = sharing_copy(model)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.dtype in HALF:
            one = tensor.dim() > 0 and tensor.stride(0) == 0
            tensor.data = tensor.data[:1].float().expand(tensor.shape) if one else tensor.data.float()
    return copied


def _unequal(equal: Equality) -> str:
    return (
        f"The written file does not compute what the source computes: max|Δ|/max|y| = {equal.max_rel_diff:.2e}, "
        f"at most {equal.tolerance:.0e} is allowed. Nothing was written. Convert fewer layers (policy rules) to find "
        "the one, and please report it."
    )


def stream(opened: Opened, plan: Plan, walked: Walk, calls: Sequence[Call]) -> Stream:
    """Choose the dynamic units of every planned layer; nothing is written or copied yet. What was `walked` is the
    source, on `PROBE_SAMPLES` samples: what it gave there is what the output has to give."""
    model = sharing_copy(opened.module)
    with torch.no_grad():
        _empty_(model, opened.module, plan)
        tensors = _packed(opened.module, model)
    probe = walked.probe if walked.outputs else None
    recorded = probe is not None and fits(PROBE_SAMPLES, (spec.shape for spec in probe.inputs))
    return Stream(model, Packed(tensors, walked.outputs if recorded else ()), opened.module, probe, calls)


def _empty_(model: nn.Module, source: nn.Module, plan: Plan) -> None:
    """Put empty layers in the place of the planned ones, under all their names."""
    empty: dict[str, nn.Module] = {}
    for index, entry in enumerate(plan.layers):
        if entry.verdict is Verdict.CONVERT:
            layer = empty_layer(source, entry, plan.seed, index)
            empty |= dict.fromkeys((entry.info.name, *entry.info.aliases), layer)
    swap_(model, empty)


# ---- which units stay dynamic


@torch.no_grad()
def _packed(source: nn.Module, model: nn.Module) -> dict[str, Content]:
    """The values of the model's empty layers, out of the source's."""
    entries = entries_of(model, trained=False)
    layers = pad_layers(model)
    cuts: dict[str, list[str]] = {}
    for name, layer in layers.items():
        cuts.setdefault(layer.group if layer.granularity is Granularity.NEURON else name, []).append(name)
    chosen = in_turn(lambda names: _chosen({name: layers[name] for name in names}, source), cuts.values())
    where = {key: found for each in chosen for key, found in each.items()}
    found: dict[str, Content] = {}
    for entry in entries:
        values = _Values(layers[entry.name], source.get_submodule(entry.name))
        for full in expected_tensors(entry):
            name = full[len(join(entry.name, "")) :]
            if not name.startswith("router."):
                part = "bias" if name.startswith("bias") else "weight"
                found[full] = values.packed(name, part, where.get((entry.name, part)))
    return found


#: where the dynamic units of a part are: indices, or (`element`) a bitmask
Where = Units | Tensor


def _chosen(layers: dict[str, PadLayer], source: nn.Module) -> dict[tuple[str, str], Where]:
    """The dynamic units of layers that are ranked as one: a layer, or a block of hidden units."""
    first = next(iter(layers.values()))
    values = {name: _Values(layer, source.get_submodule(name)) for name, layer in layers.items()}
    if first.granularity is Granularity.ELEMENT:
        ((name, layer),) = layers.items()
        return {(name, part): keep_largest(values[name].whole(part), layer.count_dynamic(part)) for part in layer.parts}
    slices = [values[name].units_first(part) for name, layer in layers.items() for part in layer.unit_parts]
    kept = keep_in_layer(_mean_size(slices, first.mixing_dtype), first.count_dynamic("weight"))
    units = Units.of_mask(kept)
    return {(name, part): units for name, layer in layers.items() for part in layer.unit_parts}


def _mean_size(slices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The mean |value| of every unit over all its slices [U, S], as `magnitude` has it: [U] fp64."""
    units, entries = len(slices[0]), sum(each.numel() for each in slices)
    # no less than two units at a time: one alone torch would sum in an order that its threads decide
    pieces = max(1, min(-(-entries // _ALONE), units // 2))
    found = [
        torch.cat([each.to(dtype) for each in some], -1).abs().mean(-1)
        for some in zip(*(each.tensor_split(pieces) for each in slices), strict=True)
    ]
    return torch.cat(found).double().cpu()


# ---- their values, piece by piece


class _Values:
    """The weight and bias of a static layer, as its Pad layer cuts them into units."""

    def __init__(self, layer: PadLayer, static: nn.Module) -> None:
        self.layer = layer
        self.static = cast(Static, static)

    def whole(self, part: str) -> Tensor:
        tensor = weight_of(self.static) if part == "weight" else self.static.bias
        assert tensor is not None
        return tensor.detach()

    def units_first(self, part: str) -> Tensor:
        """[U, S], on the source's memory where that is dense."""
        return self.layer.view(part).cut_full(self.whole(part))

    def packed(self, name: str, part: str, where: Where | None) -> Content:
        """The tensor `name` of a checkpoint."""
        if name.endswith("_bitmask"):
            assert isinstance(where, Tensor)
            return where
        if name == "dynamic_index":
            assert isinstance(where, Units)
            return where.dynamic.int()
        dynamic = name.endswith("_dynamic")
        view, stored = self.layer.view(part), getattr(self.layer, name)
        shape = tuple(stored[:1].shape) if dynamic else tuple(stored.shape)
        count = self.layer.count_dynamic(part)
        if count in (0, view.units):
            return Pieces(_dtype(stored), shape, partial(_all, self.whole(part)))
        if isinstance(where, Tensor):
            return Pieces(_dtype(stored), shape, partial(_entries, self.whole(part), where, dynamic))
        assert where is not None
        units = where.dynamic if dynamic else where.static
        return Pieces(_dtype(stored), shape, partial(_slices, self.whole(part), view, units))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _all(values: Tensor) -> Iterator[Tensor]:
    yield values


def _slices(values: Tensor, view: UnitView, units: Tensor) -> Iterator[Tensor]:
    """Whole rows of `values`, or columns."""
    if view.packed_dim == 0 and values.is_contiguous() and values.device.type == "cpu":
        rows = _plain(values.view(len(values), -1))
        for some in units.split(max(1, PIECE // (view.size * values.element_size()))):
            yield torch.from_numpy(np.take(rows, some.numpy(), axis=0))
        return
    units = units.to(values.device)
    if view.packed_dim == 0:
        for some in units.split(max(1, PIECE // (view.size * values.element_size()))):
            yield values.index_select(0, some)
        return
    for rows in values.split(max(1, PIECE // (values[0].numel() * values.element_size()))):
        yield rows.index_select(view.packed_dim, units)


def _plain(values: Tensor) -> Any:
    """The bits of the values for numpy, which does not know all dtypes, and takes them on the thread that asks."""
    return values.cpu().view(_WIDTHS[values.element_size()]).numpy()


_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _entries(values: Tensor, bits: Tensor, dynamic: bool) -> Iterator[Tensor]:
    """Single entries in row-major order: those whose bit is set, or the others."""
    flat = values.reshape(-1)
    step = PIECE // flat.element_size()
    packed = bits.numpy()
    for begin in range(0, len(flat), step):
        piece = _plain(flat[begin : begin + step])
        mask = np.unpackbits(packed[begin // 8 :][: -(-len(piece) // 8)], count=len(piece), bitorder="little").view(
            np.bool_
        )
        yield torch.from_numpy(np.compress(mask if dynamic else ~mask, piece))
