"""A model → an exported program with as many open sizes as torch can do, and what those are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from padconvert.errors import FileError, VerificationError
from padconvert.export.sizes import LEAST, Axis, Place, inputs_at
from padconvert.walk.probe import ProbeSpec
from padconvert.walk.quiet import device_of, untouched

Range = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Trace:
    """What is traced: a model, its inputs, and their sizes, `traced` for each that might stay open."""

    model: nn.Module
    probe: ProbeSpec
    traced: Mapping[Axis, int]

    def export(self, axes: Iterable[Axis], kind: Any = Dim.AUTO) -> ExportedProgram:
        """The program with these sizes open (`Dim.AUTO`: where torch can). Raises whatever torch or the model does."""
        args, kwargs = inputs_at(self.probe, self.traced, device_of(self.model))
        shapes: list[dict[int, Any]] = [{} for _ in self.probe.inputs]
        for axis in axes:
            for place in axis.places:
                bounds = {} if axis.low <= LEAST else {"min": place.times * axis.low + place.plus}
                bounds |= {} if axis.high is None else {"max": place.times * axis.high + place.plus}
                shapes[place.input][place.dim] = kind(**bounds) if bounds else kind
        with untouched(self.model):
            return torch.export.export(self.model, args, kwargs, dynamic_shapes=self._in_torchs_form(shapes))

    def _in_torchs_form(self, shapes: list[dict[int, Any]]) -> Any:
        """One entry for every argument: a tuple, or a dict by the arguments' names where some are given by name."""
        specs = list(zip(self.probe.inputs, shapes, strict=True))
        positional = [shape for spec, shape in specs if spec.name is None]
        named = {spec.name: shape for spec, shape in specs if spec.name is not None}
        if not named:
            return tuple(positional)
        names = list(inspect.signature(self.model.forward).parameters)[: len(positional)]
        return dict(zip(names, positional, strict=True)) | named

    def ranges(self, program: ExportedProgram, axes: Iterable[Axis]) -> dict[Axis, Range]:
        """Those of the axes that stayed open at all their places, and from where to where."""
        given = self._inputs_of(program)
        found: dict[Axis, Range] = {}
        for axis in axes:
            sizes: list[tuple[Place, Any]] = [(at, given[at.input].shape[at.dim]) for at in axis.places]
            if all(isinstance(size, torch.SymInt) for _, size in sizes):
                limits = [(place, *_limits(program, size)) for place, size in sizes]
                lows = [-((place.plus - low) // place.times) for place, low, _ in limits]
                highs = [(high - place.plus) // place.times for place, _, high in limits if high is not None]
                found[axis] = max(lows), min(highs, default=None)
        return found

    def _inputs_of(self, program: ExportedProgram) -> list[Tensor]:
        """What the trace had for each of the probe's inputs."""
        metas = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
        positional = (name for name in program.graph_signature.user_inputs)
        names = [next(positional) if spec.name is None else spec.name for spec in self.probe.inputs]
        found = [metas[name] for name in names]
        assert all(isinstance(each, Tensor) for each in found)
        return found


def _limits(program: ExportedProgram, size: torch.SymInt) -> Range:
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return 0, None
    return int(limits.lower), int(limits.upper) if limits.upper.is_Integer else None


@dataclass(frozen=True, slots=True)
class Exported:
    """A program, the sizes that stayed open in it and how far, and why others did not."""

    program: ExportedProgram
    ranges: Mapping[Axis, Range]
    why_fixed: str


def exported(trace: Trace, axes: Sequence[Axis]) -> Exported:
    """The program with all of these sizes open, or as many as torch can do, tried one by one.

    Raises VerificationError where a promised one is fixed or narrowed, FileError where torch cannot export the model
    at all.
    """
    try:
        program, why = trace.export(axes), ""
    except Exception as error:  # torch raises many kinds, and so does the model's own code
        program, why = _one_by_one(trace, axes), first_line(error)
    ranges = trace.ranges(program, axes)
    fixed = [axis for axis in axes if axis not in ranges]
    if fixed and not why:
        why = _why_fixed(trace, fixed)
    for axis in axes:
        if axis.promised and not _covers(ranges.get(axis), axis):
            limits = range_words(*ranges[axis]) if axis in ranges else f"{axis.traced} alone"
            limits += f" ({why})" if why else ""
            raise VerificationError(
                f"{axis.name(trace.probe)}: {range_words(axis.low, axis.high) or 'open'} in the program that the "
                f"artefact came from, but torch.export makes it {limits}. Nothing was written. Use the artefact itself "
                "with padconvert.load; please report it."
            )
    return Exported(program, ranges, why)


def _one_by_one(trace: Trace, axes: Sequence[Axis]) -> ExportedProgram:
    """The program with each size open that torch can do beside those before it."""
    try:
        program = trace.export(())
    except Exception as error:
        raise FileError(
            f"torch.export cannot export this model ({first_line(error)}). Use the artefact itself with "
            "padconvert.load."
        ) from error
    kept: list[Axis] = []
    for axis in axes:
        try:
            program = trace.export([*kept, axis])
        except Exception:  # as above: this size is one that torch cannot do
            continue
        kept.append(axis)
    return program


def _why_fixed(trace: Trace, axes: Sequence[Axis]) -> str:
    """What torch says where it has to leave sizes open that it fixes."""
    try:
        trace.export(axes, Dim.DYNAMIC)
    except Exception as error:  # torch's words for it are of several classes
        return first_line(error)
    return "torch.export fixes it"


def _covers(limits: Range | None, axis: Axis) -> bool:
    if limits is None:
        return False
    low, high = limits
    return low <= max(axis.low, LEAST) and (high is None or (axis.high is not None and high >= axis.high))


def range_words(low: int, high: int | None) -> str:
    """A range for a person, "" where it has no ends: what a model takes is more than a range can tell."""
    if low <= LEAST:
        return "" if high is None else f"up to {high}"
    return f"{low} or more" if high is None else f"{low} to {high}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
