"""A model's outputs as a manifest stores them, and the distance of other outputs from them."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from padconvert.checkpoint.manifest import ProbeOutput, ProbeRecord
from padconvert.errors import FileError, VerificationError

#: the most values of one output that are stored
MAX_VALUES = 2048
#: the most entries that a probe's inputs may have together: what a file says is checked before it is allocated
MAX_ENTRIES = 2**26
#: integers of a probe lie in int64
_WIDEST = 2**63 - 1
_DTYPES = frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))


def fits(batch: int, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether inputs of these shapes, the batch apart, are small enough to be recorded and made again."""
    return sum(batch * math.prod(shape) for shape in shapes) <= MAX_ENTRIES


def check_probe(record: ProbeRecord) -> None:
    """Raises FileError where the inputs that a file asks for cannot be made: too large, or of no type or range."""
    entries = fits(record.batch, (each.shape for each in record.inputs))
    if not entries or any(size > MAX_ENTRIES for each in record.inputs for size in each.shape):
        raise FileError(
            f"the probe's inputs are too large to be made (more than {MAX_ENTRIES} values); the manifest is forged or "
            "damaged. Make the artefact again from its source."
        )
    for number, each in enumerate(record.inputs):
        low, high = each.low, each.low + 1 if each.high is None else each.high
        if each.dtype not in _DTYPES or not -_WIDEST <= low < high <= _WIDEST or abs(record.seed) >= _WIDEST:
            raise FileError(
                f"the probe's input {number} is of no type or range that can be made; the manifest is forged or "
                "damaged. Make the artefact again from its source."
            )


def record_outputs(outputs: Sequence[Tensor]) -> tuple[ProbeOutput, ...]:
    """At most `MAX_VALUES` values of each output, taken at a fixed stride over all samples, and its max|y|."""
    return tuple(_record(output.detach().cpu()) for output in outputs)


def _record(output: Tensor) -> ProbeOutput:
    # an odd stride meets every column of a row of even length, an even one might meet only one
    stride = max(-(-output.numel() // MAX_VALUES), 1) | 1
    kept = output.reshape(-1)[::stride].to(_stored_dtype(output.dtype))
    finite = output.double()[output.isfinite()]
    return ProbeOutput(
        shape=tuple(output.shape),
        dtype=_name(output.dtype),
        max_abs=float(finite.abs().max()) if finite.numel() else 0.0,
        stride=stride,
        values=base64.b64encode(kept.contiguous().numpy().tobytes()).decode(),
    )


def compare_outputs(record: ProbeRecord, outputs: Sequence[Tensor]) -> tuple[float, float]:
    """(max|Δ|, the largest max|Δ| / max|y| of an output) over the stored values; infinite where one is not finite
    and the other differs. Raises VerificationError where number, shape or dtype differ, FileError for a bad record."""
    if len(outputs) != len(record.outputs):
        raise VerificationError(f"the model gives {len(outputs)} outputs, {len(record.outputs)} were recorded.")
    max_abs = max_rel = 0.0
    for number, (stored, output) in enumerate(zip(record.outputs, outputs, strict=True)):
        found, wanted = (_name(output.dtype), tuple(output.shape)), (stored.dtype, stored.shape)
        if found != wanted:
            raise VerificationError(f"output {number} is {found[0]} {found[1]}, {wanted[0]} {wanted[1]} was recorded.")
        difference = _distance(stored, output.detach().cpu(), number)
        max_abs = max(max_abs, difference)
        if difference:
            max_rel = max(max_rel, difference / stored.max_abs if stored.max_abs else float("inf"))
    return max_abs, max_rel


def _distance(stored: ProbeOutput, output: Tensor, number: int) -> float:
    values = _values(stored, _stored_dtype(output.dtype), number).double()
    kept = output.reshape(-1)[:: stored.stride].double()
    if len(kept) != len(values):
        raise FileError(f"the probe's output {number} holds {len(values)} values, {len(kept)} belong there.")
    same = (kept == values) | (kept.isnan() & values.isnan())
    difference = (kept - values).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.masked_fill(same, 0.0).max()) if len(kept) else 0.0


def _values(stored: ProbeOutput, dtype: torch.dtype, number: int) -> Tensor:
    try:
        data = bytearray(base64.b64decode(stored.values, validate=True))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    except (binascii.Error, ValueError):
        raise FileError(f"the probe's output {number} is damaged.") from None


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
