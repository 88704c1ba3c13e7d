"""The sizes of a model's inputs that may vary, and inputs of any such size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padconvert.walk.probe import ProbeSpec, call, flat_outputs
from padconvert.walk.quiet import device_of, untouched

#: samples that a program is traced with; another number than 0 and 1, which torch takes for constants
BATCH = 4
#: so it promises none below
LEAST = 2
#: how many other sizes of each the written program is held at
HELD = 2
#: values that the inputs of a trial may have together
MAX_VALUES = 2**26


@dataclass(frozen=True, slots=True)
class Place:
    """A dimension of an input (by its number in the probe): its size is times · the axis's + plus."""

    input: int
    dim: int
    times: int = 1
    plus: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """A size that may vary from `low` to `high`, wherever it stands; `traced` is its size in the trace.

    `promised`: the program that the model came from left it open, so an export has to.
    """

    places: tuple[Place, ...]
    traced: int
    low: int = 1
    high: int | None = None
    promised: bool = False

    @property
    def is_batch(self) -> bool:
        return all(place.dim == 0 for place in self.places)

    def name(self, probe: ProbeSpec) -> str:
        """For a person: "batch", or the input and dimension where it first stands, as "x, dimension 2"."""
        if self.is_batch:
            return "batch"
        first = next(place for place in self.places if place.dim)
        return f"{probe.inputs[first.input].name or f'input {first.input}'}, dimension {first.dim}"

    def others(self) -> list[int]:
        """Sizes in the range to try beside the traced one, the most telling first."""
        n, low = self.traced, self.low if self.low > LEAST else 1
        near = [1, 3] if self.is_batch else []
        wanted = [*near, n + 1, n // 2, n + n // 2, n - 1, 2 * n, low, n if self.high is None else self.high]
        fit = [size for size in wanted if low <= size != n and (self.high is None or size <= self.high)]
        return list(dict.fromkeys(fit))


Call = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def batch_axis(probe: ProbeSpec) -> Axis:
    """The first dimension of every input."""
    return Axis(tuple(Place(number, 0) for number in range(len(probe.inputs))), BATCH)


def inputs_at(probe: ProbeSpec, sizes: Mapping[Axis, int], device: torch.device) -> Call:
    """(args, kwargs) of these sizes; what no axis covers is as in the probe, with `BATCH` samples."""
    generator = torch.Generator().manual_seed(probe.seed)
    args, kwargs = [], {}
    for spec, shape in zip(probe.inputs, _shapes(probe, sizes), strict=True):
        drawn = dataclasses.replace(spec, shape=shape[1:]).draw(shape[0], generator).to(device)
        if spec.name is None:
            args.append(drawn)
        else:
            kwargs[spec.name] = drawn
    return tuple(args), kwargs


def _shapes(probe: ProbeSpec, sizes: Mapping[Axis, int]) -> list[tuple[int, ...]]:
    shapes = [[BATCH, *spec.shape] for spec in probe.inputs]
    for axis, size in sizes.items():
        for place in axis.places:
            shapes[place.input][place.dim] = place.times * size + place.plus
    return [tuple(shape) for shape in shapes]


def outputs_at(model: nn.Module, probe: ProbeSpec, sizes: Mapping[Axis, int]) -> list[Tensor]:
    """The model's outputs on inputs of these sizes; the model is left as it was."""
    args, kwargs = inputs_at(probe, sizes, device_of(model))
    with untouched(model):
        return flat_outputs(call(model, args, kwargs))


def takes(model: nn.Module, probe: ProbeSpec, sizes: Mapping[Axis, int]) -> bool:
    """Whether the model itself can be called with inputs of these sizes."""
    shapes = _shapes(probe, sizes)
    if any(size < 0 for shape in shapes for size in shape) or _values(shapes) > MAX_VALUES:
        return False
    try:
        return bool(outputs_at(model, probe, sizes))
    except Exception:  # whatever the model's own code raises means: not this size
        return False


def _values(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def traced_sizes(axes: Iterable[Axis]) -> dict[Axis, int]:
    return {axis: axis.traced for axis in axes}


def variable_axes(model: nn.Module, probe: ProbeSpec, promised: Sequence[Axis] | None) -> dict[Axis, list[int]]:
    """Each size that the model itself takes at others than the traced one, and `HELD` such others.

    Without a promise these are found by trying: the batch, and every further dimension, together with those of the
    same number and size in other inputs (a mask beside its tokens). The batch is tried in any case.
    """
    axes = list(promised or ())
    taken = {(place.input, place.dim) for axis in axes for place in axis.places}
    batch = batch_axis(probe)
    if not any((place.input, place.dim) in taken for place in batch.places):
        axes.insert(0, batch)
    if promised is None:
        axes += _further(probe)
    # a promised size may differ from the probe's, so all are set
    base = traced_sizes(axes)
    found: dict[Axis, list[int]] = {}
    for axis in axes:
        held: list[int] = []
        for size in axis.others():
            if len(held) < HELD and takes(model, probe, base | {axis: size}):
                held.append(size)
        if held or axis.is_batch:
            found[axis] = held
    return found


def _further(probe: ProbeSpec) -> list[Axis]:
    places: dict[tuple[int, int], list[Place]] = {}
    for number, spec in enumerate(probe.inputs):
        for dim, size in enumerate(spec.shape, 1):
            if size > 1:
                places.setdefault((dim, size), []).append(Place(number, dim))
    return [Axis(tuple(found), size) for (_, size), found in places.items()]
