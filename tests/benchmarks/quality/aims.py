"""What was aimed at before anything was measured, and what came of it: the first table of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.quality.arms import (
    CHANNEL,
    CHANNEL_LESS_SURE_FAST,
    DYNAMIC,
    DYNAMIC_FAST,
    DYNAMIC_LESS_SURE,
    DYNAMIC_LESS_SURE_FAST,
    LESS_SURE,
    LESS_SURE_FAST,
    PAD,
    PAD_FAST,
    RANDOM,
    RANDOM_LESS_SURE_FAST,
    STATIC,
    Arm,
)
from benchmarks.quality.experiments import EVERY, SEEDS, TEXTS
from benchmarks.quality.intervals import Interval, by_seed
from benchmarks.quality.study import Results
from benchmarks.quality.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Aim:
    """`ours` at least so many `points` above `theirs`; on each of the tasks, or in their `mean`. Where it is a gain,
    its interval has to exclude nothing gained."""

    title: str
    tasks: tuple[str, ...]
    ours: Arm
    theirs: Arm
    points: float
    mean: bool = False

    def met(self, found: Interval) -> bool:
        return found.mean >= self.points and (self.points <= 0 or found.excludes_zero)

    def verdict(self, values: Sequence[float], tasks: int) -> str:
        """Of seeds' differences; `tasks` of them were run."""
        if not values:
            return "not run"
        said = "reached" if self.met(Interval.of(values)) else "**missed**"
        return said if len(values) >= len(SEEDS) and tasks == len(self.tasks) else f"{said} so far"


SEVERAL = tuple(f"{name} (16 px, finished, long)" for name in ("two domains", "sensors"))
ONE = tuple(f"{name} (16 px, finished, long)" for name in ("CIFAR-10", "Fashion-MNIST"))

#: PAD on pictures, and its neighbours with the same routers and rate of the experts: the default, and three others
WAYS = (
    (LESS_SURE, DYNAMIC_LESS_SURE, ""),
    (LESS_SURE_FAST, DYNAMIC_LESS_SURE_FAST, ", × 4"),
    (PAD, DYNAMIC, ", surer"),
    (PAD_FAST, DYNAMIC_FAST, ", surer, × 4"),
)
PARTITIONS = (
    (LESS_SURE_FAST, RANDOM_LESS_SURE_FAST, CHANNEL_LESS_SURE_FAST, ", × 4"),
    (PAD, RANDOM, CHANNEL, ", surer"),
)
PICTURES = (*SEVERAL, *ONE)

AIMS: tuple[Aim, ...] = (
    *(Aim(f"several domains, PAD over static{said}", SEVERAL, pad, STATIC, 2.0) for pad, _, said in WAYS),
    *(Aim(f"several domains, PAD over fully dynamic{said}", SEVERAL, pad, full, 0.0) for pad, full, said in WAYS),
    *(
        Aim(f"several domains, PAD over a random partition{said}", SEVERAL, pad, random, 0.5)
        for pad, random, _, said in PARTITIONS
    ),
    *(Aim(f"one domain, PAD over static{said}", ONE, pad, STATIC, 1.0) for pad, _, said in WAYS),
    *(Aim(f"one domain, PAD over fully dynamic{said}", ONE, pad, full, 0.7) for pad, full, said in WAYS),
    Aim("texts, PAD over static, surer", TEXTS, PAD, STATIC, 0.0, mean=True),
    Aim("texts, PAD over fully dynamic, surer", TEXTS, PAD, DYNAMIC, 1.9, mean=True),
    Aim("all, PAD over a random partition, surer", (*PICTURES, *TEXTS), PAD, RANDOM, 0.3, mean=True),
    Aim("pictures, PAD over a random partition, × 4", PICTURES, LESS_SURE_FAST, RANDOM_LESS_SURE_FAST, 0.3, True),
    *(
        Aim(f"pictures, `channel` over `element`{said}", PICTURES, channel, pad, -0.3)
        for pad, _, channel, said in PARTITIONS
    ),
)


def table(results: Results) -> Iterator[str]:
    """One line an aim and task; of a mean, one line for the tasks that have all seeds of both arms, or for those that
    have some where none has all. A mean takes the tasks' first seeds together, then their second ones, and so on: those
    of two tasks have nothing in common, whatever their numbers."""
    yield "| aim | task | wanted | found | |"
    yield "|---|---|--:|--:|---|"
    for aim in AIMS:
        each = {name: by_seed(results, TASKS[name], aim.ours, aim.theirs, EVERY) for name in aim.tasks}
        found = {name: values for name, values in each.items() if values}
        if aim.mean:
            found = {name: values for name, values in found.items() if len(values) >= len(SEEDS)} or found
            means = [fmean(values) for values in zip(*(each.values() for each in found.values()), strict=False)]
            yield _line(aim, f"mean of {len(found)} of {len(aim.tasks)} tasks", means, len(found))
        else:
            yield from (_line(aim, name, list(values.values()), len(aim.tasks)) for name, values in each.items())


def _line(aim: Aim, where: str, values: list[float], tasks: int) -> str:
    found = Interval.of(values).said(sign=True) if values else ""
    seeds = f" (seeds: {len(values)})" if values and len(values) < len(SEEDS) else ""
    return f"| {aim.title} | {where} | ≥ {aim.points:+g} | {found}{seeds} | {aim.verdict(values, tasks)} |"
