"""Time several calls beside each other: A, B, C, A, B, C …, so that whatever else the machine does meets all of them.

Numbers are read as ratios inside one round, never across runs: a busy machine slows a whole round down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

#: a sample lasts at least this long (shorter calls are repeated within it): clocks and callers cost microseconds
SAMPLE_SECONDS = 0.01
MAX_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Spread(median(values), low, high)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: `rounds` at most, `least` at least, and between them no longer than `seconds`."""

    rounds: int
    least: int
    seconds: float
    warm_up: int = 2


#: for a table that stays, and for a look
THOROUGH = Effort(rounds=31, least=9, seconds=20.0)
QUICK = Effort(rounds=5, least=3, seconds=1.0, warm_up=1)


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds a call, by name and round. All names have the same rounds; `finished` is False after a Ctrl-C."""

    seconds: Mapping[str, tuple[float, ...]]
    finished: bool = True

    @property
    def rounds(self) -> int:
        return min((len(times) for times in self.seconds.values()), default=0)

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """How many times as long as `base`, round by round. Raises ValueError where no round was finished."""
        if not self.rounds:
            raise ValueError("no round was finished")
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([one / other for one, other in pairs])


def measure(
    calls: Mapping[str, Callable[[], object]],
    effort: Effort,
    *,
    clock: Callable[[], float] = time.perf_counter,
    done: Callable[[int, int], object] | None = None,
) -> Paired:
    """Run `calls` in turn, in their order, after warming each up. `done` hears of every round, and of how many.

    A Ctrl-C ends it with the rounds that are whole; in the warm-up, or before the first of them, it is passed on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: _repeats(call, effort.warm_up, clock) for name, call in calls.items()}
    start = clock()
    try:
        for number in range(effort.rounds):
            taken = {name: _sample(call, repeats[name], clock) for name, call in calls.items()}
            for name, seconds in taken.items():
                times[name].append(seconds)
            if done is not None:
                done(number + 1, effort.rounds)
            if number + 1 >= effort.least and clock() - start > effort.seconds:
                break
    except KeyboardInterrupt:
        if not all(times.values()):
            raise
        return Paired(_whole(times), finished=False)
    return Paired(_whole(times))


def _whole(times: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """A Ctrl-C may come while a round is noted down."""
    rounds = min(len(each) for each in times.values())
    return {name: tuple(each[:rounds]) for name, each in times.items()}


def _repeats(call: Callable[[], object], warm_up: int, clock: Callable[[], float]) -> int:
    """How often a sample calls it, by its last warm-up call (the first ones allocate, choose and compile)."""
    last = 0.0
    for _ in range(max(warm_up, 1)):
        last = _sample(call, 1, clock)
    return min(max(math.ceil(SAMPLE_SECONDS / last), 1), MAX_CALLS) if last > 0 else 1


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
