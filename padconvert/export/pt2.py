"""A converted model → `.pt2`: a program of torch's own operations, which loads where padconvert is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from padconvert.checkpoint.whole_file import sibling
from padconvert.checkpoint.write import check_target
from padconvert.errors import FileError, VerificationError
from padconvert.export.sizes import LEAST, Axis, outputs_at, takes, traced_sizes, variable_axes
from padconvert.export.traced import Exported, Trace, exported, first_line, range_words
from padconvert.results import Check
from padconvert.walk.probe import ProbeSpec

#: max|Δ| / max|y| between the model and the written program: an export may sum in another order
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def write_pt2(
    model: nn.Module,
    probe: ProbeSpec,
    path: Path,
    *,
    promised: Sequence[Axis] | None = None,
    force: bool = False,
    source: Path | None = None,
) -> tuple[Check, ...]:
    """Export the model with the probe's inputs and save the program, whole or not at all.

    The sizes in `promised` stay open as far as they were; without a promise those do that torch leaves open, out of
    all at whose other values the model itself runs. The written file is loaded again with torch alone and held
    against the model at the traced and at other values of each; the checks are returned. Raises VerificationError
    where outputs differ or a promised size came out fixed, FileError where torch cannot export the model or the
    file cannot be written, UsageError as `check_target`.
    """
    check_target(path, force=force, source=source)
    sizes = variable_axes(model, probe, promised)
    target = Path(os.path.realpath(path))
    try:
        with sibling(target) as (temporary, file):
            checks = _written(Trace(model, probe, traced_sizes(sizes)), sizes, temporary, file)
            check_target(path, force=force, source=source)  # again: the file may have come up meanwhile
            temporary.replace(target)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error}). Name another place with -o."
        ) from error
    return checks


def _written(trace: Trace, sizes: Mapping[Axis, Sequence[int]], temporary: Path, file: IO[bytes]) -> tuple[Check, ...]:
    """Export and hold, with fewer open sizes until the program runs at other values of each that it leaves open."""
    axes = [axis for axis, others in sizes.items() if others]
    why_not: dict[Axis, str] = {}
    while True:
        made = exported(trace, axes)
        _return_plain_(made.program)
        file.seek(0)
        file.truncate()
        torch.export.save(made.program, file)
        file.flush()
        os.fsync(file.fileno())
        parity = _Parity(trace, _load(temporary))
        stuck = parity.hold({axis: sizes[axis] for axis in made.ranges})
        why_not |= parity.refused | ({axis: made.why_fixed for axis in axes if axis not in made.ranges})
        if not stuck:
            return (*parity.checks, *_said(parity, sizes, made, why_not))
        axes = [axis for axis in made.ranges if axis not in stuck]


def _load(written: Path) -> nn.Module:
    with written.open("rb") as file:
        # written a moment ago by this very call, and nobody else's
        return torch.export.load(file).module()  # noqa: TID251


def _return_plain_(program: ExportedProgram) -> None:
    """Outputs as tuples, lists and dicts: a class of transformers' would have to be there when the file is loaded."""
    signature = program.module_call_graph[0].signature
    assert signature is not None
    spec = signature.out_spec
    numbers = list(range(spec.num_leaves))
    plain = _plain(pytree.tree_unflatten(numbers, spec))
    if pytree.tree_leaves(plain) == numbers:
        signature.out_spec = pytree.tree_structure(plain)


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case tuple():
            return tuple(_plain(each) for each in value)
        case _:
            return value


@dataclass
class _Parity:
    """The written program beside the model. `checks` grows; `refused` notes the values that torch's guards refuse."""

    trace: Trace
    module: nn.Module
    checks: list[Check] = field(default_factory=list)
    refused: dict[Axis, str] = field(default_factory=dict)
    ran: dict[Axis, list[int]] = field(default_factory=dict)

    def hold(self, sizes: Mapping[Axis, Sequence[int]]) -> list[Axis]:
        """Hold the program at the traced sizes, at others of each axis, and at others of all at once; the axes that
        are not open after all, for no other value runs. Raises VerificationError where the outputs differ."""
        base = dict(self.trace.traced)
        batch = next(axis for axis in base if axis.is_batch)
        if error := self._at(f"batch of {base[batch]}", base):
            raise VerificationError(f"The exported program cannot be called ({error}).")
        for axis, others in sizes.items():
            for size in others:
                if error := self._at(f"{axis.name(self.trace.probe)} of {size}", base | {axis: size}):
                    self._refuse(axis, size, error)
                else:
                    self.ran.setdefault(axis, []).append(size)
        stuck = [axis for axis in sizes if axis not in self.ran]
        ran = {axis: held[0] for axis, held in self.ran.items()}
        if stuck or len(ran) < 2 or not takes(self.trace.model, self.trace.probe, base | ran):
            return stuck
        if not (error := self._at("all sizes changed", base | ran)):
            return []
        # each alone, but not together
        for axis in ran:
            self._refuse(axis, ran[axis], error)
        return [axis for axis in ran if not axis.is_batch]

    def _at(self, name: str, sizes: Mapping[Axis, int]) -> str:
        """Hold the outputs at these sizes; "", or why the program cannot be called so."""
        wanted = outputs_at(self.trace.model, self.trace.probe, sizes)
        try:
            found = outputs_at(self.module, self.trace.probe, sizes)
        except Exception as error:  # torch's guards, for a size that the traced branch does not fit
            return first_line(error)
        value, limit = _difference(wanted, found)
        if not value <= limit:
            raise VerificationError(
                f"The exported program does not compute what the model computes: outputs differ by {value:.2e} of "
                f"their largest at {name}, at most {limit:.0e} is allowed. Nothing was written; please report it."
            )
        self.checks.append(Check(f"same outputs, {name}", True, value, limit, "max|Δ| / max|y|"))
        return ""

    def _refuse(self, axis: Axis, size: int, error: str) -> None:
        if axis.promised and size >= LEAST:
            raise VerificationError(
                f"{axis.name(self.trace.probe)}: the program that the artefact came from leaves it open, but the "
                f"exported one refuses {size} ({error}). Nothing was written. Use the artefact itself with "
                "padconvert.load; please report it."
            )
        self.refused.setdefault(axis, f"but not {size}: {error}")


def _said(
    parity: _Parity, sizes: Mapping[Axis, Sequence[int]], made: Exported, why_not: Mapping[Axis, str]
) -> Iterator[Check]:
    """What became of each size that the model itself takes at other values; the batch is always named."""
    for axis in sizes:
        name = axis.name(parity.trace.probe)
        if axis in made.ranges:
            held = "held at " + ", ".join(str(size) for size in (axis.traced, *parity.ran[axis]))
            said = (range_words(*made.ranges[axis]), held, why_not.get(axis, ""))
            yield Check(name, True, "dynamic", None, "; ".join(each for each in said if each))
        else:
            why = why_not.get(axis) or "the model itself takes no other"
            yield Check(name, True, "fixed", None, f"{axis.traced}, as traced: {why}", held=False)


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """(the largest max|Δ| / max|y| of an output, what is allowed); infinite where shapes or infinite places differ."""
    limit = max((TOLERANCE.get(output.dtype, 0.0) for output in wanted), default=0.0)
    if not wanted or [(o.shape, o.dtype) for o in wanted] != [(o.shape, o.dtype) for o in found]:
        return float("inf"), limit
    return max(_relative(a.double(), b.double()) for a, b in zip(wanted, found, strict=True)), limit


def _relative(wanted: Tensor, found: Tensor) -> float:
    same = (wanted == found) | (wanted.isnan() & found.isnan())
    if bool(same.all()):
        return 0.0
    difference = float((wanted - found).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0).max())
    finite = wanted[wanted.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return difference / largest if largest else float("inf")
