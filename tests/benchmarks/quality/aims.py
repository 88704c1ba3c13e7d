"""What was aimed at before anything was measured, and what came of it: the first table of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.quality.arms import CHANNEL, DYNAMIC, DYNAMIC_FAST, PAD, PAD_FAST, RANDOM, STATIC, Arm
from benchmarks.quality.experiments import SEEDS, TEXTS
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
        return said if len(values) == len(SEEDS) and tasks == len(self.tasks) else f"{said} so far"


SEVERAL = tuple(f"{name} (16 px, finished, long)" for name in ("two domains", "sensors"))
ONE = tuple(f"{name} (16 px, finished, long)" for name in ("CIFAR-10", "Fashion-MNIST"))

#: one setting of all arms with experts: the best for convolutions, and the default
RATES = ((PAD_FAST, DYNAMIC_FAST, ""), (PAD, DYNAMIC, ", experts' lr × 1"))

AIMS: tuple[Aim, ...] = (
    *(Aim(f"several domains, PAD over static{rate}", SEVERAL, pad, STATIC, 2.0) for pad, _, rate in RATES),
    *(Aim(f"several domains, PAD over fully dynamic{rate}", SEVERAL, pad, full, 0.0) for pad, full, rate in RATES),
    Aim("several domains, PAD over a random partition, experts' lr × 1", SEVERAL, PAD, RANDOM, 0.5),
    *(Aim(f"one domain, PAD over static{rate}", ONE, pad, STATIC, 1.0) for pad, _, rate in RATES),
    *(Aim(f"one domain, PAD over fully dynamic{rate}", ONE, pad, full, 0.7) for pad, full, rate in RATES),
    Aim("texts, PAD over static, experts' lr × 1", TEXTS, PAD, STATIC, 0.0, mean=True),
    Aim("texts, PAD over fully dynamic, experts' lr × 1", TEXTS, PAD, DYNAMIC, 1.9, mean=True),
    Aim("all, PAD over a random partition, experts' lr × 1", (*SEVERAL, *ONE, *TEXTS), PAD, RANDOM, 0.3, mean=True),
    Aim("pictures, `channel` over `element`, experts' lr × 1", (*SEVERAL, *ONE), CHANNEL, PAD, -0.3),
)


def table(results: Results) -> Iterator[str]:
    """One line an aim and task; of a mean, one line for the tasks that have all seeds of both arms, or for those that
    have some where none has all."""
    yield "| aim | task | wanted | found | |"
    yield "|---|---|--:|--:|---|"
    for aim in AIMS:
        each = {name: by_seed(results, TASKS[name], aim.ours, aim.theirs, SEEDS) for name in aim.tasks}
        found = {name: values for name, values in each.items() if values}
        if aim.mean:
            found = {name: values for name, values in found.items() if len(values) == len(SEEDS)} or found
            seeds = set.intersection(*(set(values) for values in found.values())) if found else set()
            means = [fmean(values[seed] for values in found.values()) for seed in sorted(seeds)]
            yield _line(aim, f"mean of {len(found)} of {len(aim.tasks)} tasks", means, len(found))
        else:
            yield from (_line(aim, name, list(values.values()), len(aim.tasks)) for name, values in each.items())


def _line(aim: Aim, where: str, values: list[float], tasks: int) -> str:
    found = Interval.of(values).said(sign=True) if values else ""
    seeds = f" (seeds: {len(values)})" if values and len(values) < len(SEEDS) else ""
    return f"| {aim.title} | {where} | ≥ {aim.points:+g} | {found}{seeds} | {aim.verdict(values, tasks)} |"
