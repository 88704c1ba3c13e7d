"""Intervals and paired differences over seeds.

A mean is over seeds; ± is half a 95 % interval of Student's t. A difference is taken pair by pair: same seed, so the
same batches and augmentation, and the same source. Nothing here is chosen: rates were, on held-out training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

from benchmarks.quality.arms import Arm
from benchmarks.quality.study import Result, Results, Run, chosen_rate, same_source
from benchmarks.quality.tasks import Task


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean in points (hundredths) and half of its 95 % interval; None for fewer than two values."""

    mean: float
    half: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        points = [100 * value for value in values]
        if len(points) < 2:
            return Interval(fmean(points), None)
        return Interval(fmean(points), float(student.ppf(0.975, len(points) - 1)) * stdev(points) / len(points) ** 0.5)

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def said(self, sign: bool = False) -> str:
        mean = f"{self.mean:+.2f}" if sign else f"{self.mean:.2f}"
        return mean if self.half is None else f"{mean} ± {self.half:.2f}"


def runs_of(
    results: Results, task: Task, arm: Arm, seeds: Sequence[int], rate: float | None = None
) -> dict[int, Result]:
    """The arm's result for every seed that has one, at `rate` or at the one that was chosen for the arm."""
    rate = chosen_rate(results, task, arm, seeds[0]) if rate is None else rate
    if rate is None:
        return {}
    found = {seed: results.of(Run(task, arm, seed, rate)) for seed in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def on_test(runs: dict[int, Result], metric: str) -> Interval:
    return Interval.of([run["test"][metric] for run in runs.values()])


def by_seed(results: Results, task: Task, ours: Arm, theirs: Arm, seeds: Sequence[int]) -> dict[int, float]:
    """Ours minus theirs on the test set, for every seed that both have run."""
    first, second = (runs_of(results, task, arm, seeds) for arm in (ours, theirs))
    return _differences(first, second, task.metric)


def difference(ours: dict[int, Result], theirs: dict[int, Result], metric: str = "accuracy") -> Interval | None:
    """Ours minus theirs, seed by seed; None where they share none."""
    found = _differences(ours, theirs, metric)
    return Interval.of(list(found.values())) if found else None


def _differences(ours: dict[int, Result], theirs: dict[int, Result], metric: str) -> dict[int, float]:
    paired = [seed for seed in ours if seed in theirs and same_source(ours[seed], theirs[seed])]
    return {seed: ours[seed]["test"][metric] - theirs[seed]["test"][metric] for seed in paired}
