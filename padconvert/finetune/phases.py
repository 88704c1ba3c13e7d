"""When things happen in a fine-tune: warm-up, partition rounds, recovery; all counted in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class TrainPolicy(Protocol):
    """What the loop reads of a policy's `train:` block."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def partitioning(self) -> float: ...
    @property
    def schedule(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Phases:
    """`steps` in all; the first `warmup` have no round; round t of `rounds` comes before step `round_steps[t − 1]`."""

    steps: int
    warmup: int
    round_steps: tuple[int, ...]
    cosine: bool

    @staticmethod
    def of(train: TrainPolicy, rounds: int) -> Phases:
        """Rounds spread evenly over the partitioning share, the last one at its end."""
        warmup = round(train.steps * train.warmup)
        span = min(round(train.steps * train.partitioning), train.steps - warmup)
        places = tuple(warmup + span * t // rounds for t in range(1, rounds + 1)) if rounds else ()
        return Phases(train.steps, warmup, places, train.schedule == "cosine")

    def rounds_before(self, step: int) -> list[int]:
        """Rounds (1-based) due before step `step`; `step == steps` asks for those due after the last step."""
        return [t for t, place in enumerate(self.round_steps, 1) if place == step]

    def warmed(self, step: int) -> float:
        """The share of the warm-up that is behind step `step`, at most 1."""
        return 1.0 if self.warmup == 0 else min(step / self.warmup, 1.0)

    def lr_factor(self, step: int) -> float:
        """Multiplies the learning rate at step `step`: half a cosine from 1 towards 0, or 1."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2 if self.cosine else 1.0
