"""A converted model → `.pt2`: a program of torch's own operations, which loads where padconvert is not installed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from padconvert.checkpoint.whole_file import sibling
from padconvert.checkpoint.write import check_target
from padconvert.errors import FileError, VerificationError
from padconvert.results import Check
from padconvert.walk.probe import ProbeSpec, call, flat_outputs
from padconvert.walk.quiet import device_of, untouched

#: samples that the program is traced with; another number than 0 and 1, which torch takes for constants
BATCH = 4
#: samples of the further checks, where the batch is dynamic
OTHER_BATCHES = (1, 3)
#: max|Δ| / max|y| between the model and the written program: an export may sum in another order
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def write_pt2(
    model: nn.Module, probe: ProbeSpec, path: Path, *, force: bool = False, source: Path | None = None
) -> tuple[Check, ...]:
    """Export the model with the probe's inputs and save the program, whole or not at all.

    The written file is loaded again with torch alone and held against the model on the probe, and with a dynamic
    batch on other batch sizes; the checks are returned. Raises VerificationError where the outputs differ,
    FileError where torch cannot export the model or the file cannot be written, UsageError as `check_target`.
    """
    check_target(path, force=force, source=source)
    program, why_fixed = _exported(model, probe)
    target = Path(os.path.realpath(path))
    try:
        with sibling(target) as (temporary, file):
            torch.export.save(program, file)
            file.flush()
            os.fsync(file.fileno())
            checks = _parity(model, temporary, probe, why_fixed)
            check_target(path, force=force, source=source)  # again: the file may have come up meanwhile
            temporary.replace(target)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error}). Name another place with -o."
        ) from error
    return checks


def _exported(model: nn.Module, probe: ProbeSpec) -> tuple[ExportedProgram, str]:
    """The program, with a dynamic batch where torch allows one; otherwise the words that say why not."""
    args, kwargs = probe.make(BATCH, device_of(model))
    shapes = _dynamic_batch(model, args, kwargs)
    why_fixed = ""
    with untouched(model):
        try:
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes)
        except Exception as error:  # torch raises many kinds, and so does the model's own code
            why_fixed = _first_line(error)
            try:
                program = torch.export.export(model, args, dict(kwargs))
            except Exception as worse:
                raise FileError(
                    f"torch.export cannot export this model ({_first_line(worse)}). Use the artefact itself with "
                    "padconvert.load."
                ) from worse
    _return_plain_(program)
    return program, why_fixed


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def _dynamic_batch(model: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Any:
    """The first dimension of every input as dynamic, in the form that torch wants."""
    batch = {0: Dim.DYNAMIC}
    if not kwargs:
        return tuple(batch for _ in args)
    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    return dict.fromkeys([*names, *kwargs], batch)


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


def _parity(model: nn.Module, written: Path, probe: ProbeSpec, why_fixed: str) -> tuple[Check, ...]:
    """The written file against the model. Raises VerificationError where they differ."""
    with written.open("rb") as file:
        # written a moment ago by this very call, and nobody else's
        program = torch.export.load(file)  # noqa: TID251
    module = program.module()
    checks, said = [], "any number of samples"
    for batch in (BATCH,) if why_fixed else (BATCH, *OTHER_BATCHES):
        try:
            value, limit = _difference(model, module, probe, batch)
        except Exception as error:  # torch's guards, for a size that the traced branch does not fit
            if batch == BATCH:
                raise VerificationError(f"The exported program cannot be called ({_first_line(error)}).") from error
            said = f"but not {batch}: {_first_line(error)}"
            continue
        if not value <= limit:
            raise VerificationError(
                f"The exported program does not compute what the model computes: outputs differ by {value:.2e} of "
                f"their largest at batch size {batch}, at most {limit:.0e} is allowed. Nothing was written; please "
                "report it."
            )
        checks.append(Check(f"same outputs, batch of {batch}", True, value, limit, "max|Δ| / max|y|"))
    if why_fixed:
        said = f"{BATCH} samples, as traced: {why_fixed}"
    return (*checks, Check("batch", True, "fixed" if why_fixed else "dynamic", None, said))


def _difference(model: nn.Module, module: nn.Module, probe: ProbeSpec, batch: int) -> tuple[float, float]:
    """(the largest max|Δ| / max|y| of an output, what is allowed); infinite where shapes or infinite places differ."""
    args, kwargs = probe.make(batch, device_of(model))
    with untouched(model):
        wanted = flat_outputs(call(model, args, kwargs))
        found = flat_outputs(call(module, args, kwargs))
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
