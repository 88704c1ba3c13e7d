"""What the tables are held against: a bound for each row that has one, beside the number that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.rows import Row

#: tables of one device and dtype by name, each its rows by key
Rows = Mapping[str, Mapping[str, Row]]


@dataclass(frozen=True, slots=True)
class Held:
    """`measured` is None where the row was not taken."""

    what: str
    at_most: float
    measured: float | None
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.at_most


def held(rows: Rows) -> list[Held]:
    """Every bound for two CPU cores in fp32, in the order of the document."""
    return [*_networks(rows), *_convolutions(rows), *_steps(rows), *_experts(rows), *_commands(rows)]


def over(row: Row, name: str, base: str) -> float:
    """The median ratio."""
    return float(row["over"][base][name][0])


def _one(rows: Rows, table: str, key: str, value: Callable[[Row], float]) -> float | None:
    row = rows.get(table, {}).get(key)
    return None if row is None else value(row)


def _networks(rows: Rows) -> Iterator[Held]:
    bounds = {
        ("ResNet-50", "channel"): {1: 1.20, 8: 1.20, 32: 1.08},
        ("ResNet-50", "element"): {1: 1.6, 8: 1.6, 32: 1.4},
        ("MobileNetV2", "channel"): {1: 1.25, 32: 1.2},
    }
    for (net, granularity), limits in bounds.items():
        for batch, limit in limits.items():
            found = _one(rows, "networks", f"{net}, B {batch}", lambda row, g=granularity: over(row, g, "static"))  # type: ignore[misc]
            yield Held(f"{net}, `{granularity}`, B {batch}, over static", limit, found)
    beside = [row for row in rows.get("networks", {}).values() if row["net"] == "ResNet-50"]
    mean = _mean([over(row, "element", "paper") for row in beside])
    yield Held("ResNet-50, `element`, over the paper's form, geometric mean", 1 / 5, mean)


def _convolutions(rows: Rows) -> Iterator[Held]:
    found = list(rows.get("convolutions", {}).values())
    for granularity in ("channel", "element"):
        ratios = [over(row, granularity, "paper") for row in found]
        what = f"convolutions of ResNet-18/50, `{granularity}`, over the paper's form"
        yield Held(f"{what}, geometric mean", 1 / 6, _mean(ratios))
        yield Held(f"{what}, worst shape", 1.0, max(ratios, default=None))


def _steps(rows: Rows) -> Iterator[Held]:
    for name, limit in (("fully dynamic", 1.5), ("channel", 1.25)):
        found = _one(rows, "finetune_step", "ResNet-20, B 128", lambda row, name=name: over(row, name, "static"))  # type: ignore[misc]
        yield Held(f"fine-tune step of CIFAR ResNet-20, B 128, {name}, over static", limit, found)


def _experts(rows: Rows) -> Iterator[Held]:
    for tokens in (128, 1024, 4096):
        found = _one(rows, "experts", f"T {tokens}", lambda row: over(row, "neuron", "dense"))
        yield Held(f"MoE FFN, `neuron` κ = 0.5, T {tokens}, over dense", 1.65, found)
        found = _one(rows, "experts", f"T {tokens}", _over_theirs)
        yield Held(f"gated MoE FFN, `neuron` κ = 0.5, T {tokens}, over transformers' own block", 0.75, found)


def _over_theirs(row: Row) -> float:
    """Over the fastest of its implementations."""
    return max(over(row, "neuron gated", base) for base in row["over"] if base.startswith("mixtral"))


def _commands(rows: Rows) -> Iterator[Held]:
    for granularity, limit in (("channel", 1.5), ("element", 2.5)):
        time = _one(rows, "conversion", granularity, lambda row: over(row, "convert", "copying"))
        yield Held(f"data-free conversion of 1 GB, `{granularity}`, over copying it", limit, time)
    for granularity in ("channel", "element"):
        memory = _one(rows, "conversion", granularity, lambda row: float(row["peak_over_limit"]))
        yield Held(f"its peak of anonymous memory, `{granularity}`, over 4 × the largest layer + 400 MB", 1.0, memory)
    size = _one(rows, "conversion", "ResNet-50's checkpoint", lambda row: float(row["bytes_over_needed"]))
    yield Held("ResNet-50's checkpoint bytes over values + mask bits", 1.002, size)
    for name, limit, part in (("--help", 0.25, "more"), ("inspect", 0.5, "seconds")):
        found = _one(rows, "startup", "commands", lambda row, name=name, part=part: float(row[part][name][0]))  # type: ignore[misc]
        said = "more than `python -c pass`" if part == "more" else "of a 1 GB safetensors file"
        yield Held(f"`padconvert {name}`, {said}", limit, found, " s")


def _mean(ratios: Sequence[float]) -> float | None:
    return geometric_mean(ratios) if ratios else None
