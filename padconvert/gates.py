"""Bounds that a user sets on a run (`--max-size 25MB` …): each is decided as early as it can be, on plain numbers.

A bound that is not met ends the run with exit code 8; nothing is written then. What a gate needs and does not have
(labels for an accuracy) is a UsageError before any work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from decimal import Decimal

from padconvert.errors import GateError, UsageError
from padconvert.results import Gate, Metrics

UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for base, names in ((1000, ("kB", "MB", "GB", "TB")), (1024, ("KiB", "MiB", "GiB", "TiB")))
    for power, unit in enumerate(names, start=1)
}
_UNITS = {unit.upper(): factor for unit, factor in UNITS.items()}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([a-zA-Z]*)")
_COUNTED = "weights, gradients, optimizer state, scoring; not data, activations and torch itself"
#: accuracies are quotients of small counts: a difference that equals the bound must not fail by its last bit
_ROUNDING = 1e-12


def parse_size(option: str, text: str) -> int:
    """`25MB`, `1.5GiB` or `1000000` in whole bytes, rounded down. MB are 1000² bytes, MiB 1024².

    Raises UsageError for anything else, naming `option`.
    """
    found = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(found[2].upper()) if found else None
    if found is None or factor is None:
        raise UsageError(f"{option} {text}: write a size as in 25MB, 1.5GiB or 1000000 (bytes)")
    size = int(Decimal(found[1]) * factor)
    if size < 1:
        raise UsageError(f"{option} {text}: take a size of at least one byte")
    return size


def check_bounds(
    max_accuracy_drop: float | None, max_size: int | None, max_memory: int | None, require_layers: int | None
) -> None:
    """Raises UsageError for a bound that no run could be held against."""
    drop = max_accuracy_drop
    if drop is not None and not (math.isfinite(drop) and 0 <= drop <= 1):
        raise UsageError(f"--max-accuracy-drop {drop}: a fraction from 0 to 1, as 0.01 for one point in a hundred")
    for option, size in (("--max-size", max_size), ("--max-memory", max_memory)):
        if size is not None and size < 1:
            raise UsageError(f"{option} {size}: take a size of at least one byte")
    if require_layers is not None and require_layers < 1:
        raise UsageError(f"--require-layers {require_layers}: take a number of layers, 1 or more")


def check_strict(unsafe: Iterable[str]) -> None:
    """`unsafe` are the words of the call that run or trust code. Raises UsageError that names them."""
    named = list(unsafe)
    if named:
        raise UsageError(
            f"--strict: refuses {', '.join(named)}, which runs or trusts code. Leave that away, or --strict"
        )


def strict_gate(strict: bool) -> tuple[Gate, ...]:
    """A run that got this far with --strict used no option that it refuses."""
    return (Gate("strict", 0, 0, True, "options"),) if strict else ()


def layers_gate(converted: int, bound: int | None) -> tuple[Gate, ...]:
    """Layers that the plan converts, at least `bound`; () without a bound, as in all that follow."""
    return () if bound is None else (Gate("require_layers", converted, bound, converted >= bound, "layers"),)


def size_gate(size: int, bound: int | None, measured: str = "file_bytes") -> tuple[Gate, ...]:
    """Bytes of the file, at most `bound`; or "tensor_bytes", which it has at least."""
    return () if bound is None else (Gate("max_size", size, bound, size <= bound, measured),)


def memory_gate(size: int, bound: int | None, measured: str = "estimated_bytes") -> tuple[Gate, ...]:
    """Bytes of memory at the run's peak as `plan.memory` estimates them, at most `bound`; or "source_bytes"."""
    return () if bound is None else (Gate("max_memory", size, bound, size <= bound, measured),)


def accuracy_gate(source: Metrics, output: Metrics, bound: float | None) -> tuple[Gate, ...]:
    """The accuracy of the source minus that of the output, at most `bound`; fractions."""
    if bound is None:
        return ()
    drop = source["accuracy"] - output["accuracy"]
    return (Gate("max_accuracy_drop", drop, bound, drop <= bound + _ROUNDING, "accuracy"),)


def missed(gates: Iterable[Gate]) -> tuple[Gate, ...]:
    """Those that are not met."""
    return tuple(gate for gate in gates if not gate.passed)


def hold(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """The gates, all of them met. Raises GateError that names every one that is not, with its value and bound."""
    if missed(gates):
        options = "; ".join(f"--{gate.name.replace('_', '-')}: {said(gate)}" for gate in missed(gates))
        raise GateError(f"a bound is not met: {options}. Nothing was written.", [asdict(gate) for gate in gates])
    return tuple(gates)


def said(gate: Gate) -> str:
    """A gate in words: what was measured, and its bound."""
    match gate.measured:
        case "options":
            return "no option runs or trusts code"
        case "layers":
            return f"layers converted {gate.value} (at least {gate.bound})"
        case "file_bytes":
            return f"bytes of the file {gate.value:,} (at most {gate.bound:,})"
        case "tensor_bytes":
            return f"at least {gate.value:,} bytes of tensors, header not counted (at most {gate.bound:,} in the file)"
        case "estimated_bytes":
            return f"bytes of memory, estimated {gate.value:,} (at most {gate.bound:,}; {_COUNTED})"
        case "source_bytes":
            return f"the source's tensors alone take {gate.value:,} bytes of memory (at most {gate.bound:,})"
        case _:
            return f"accuracy lost {gate.value:.4f} (at most {gate.bound:g})"
