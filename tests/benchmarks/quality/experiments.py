"""What is run, in this order. To add a question, add arms or tasks here; `make study` runs what has no result yet."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.arms import CHANNEL, DYNAMIC, IDEAS, PAD, RANDOM, STATIC, Arm

SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Every arm on every task from the same networks. Rates are chosen on the first seed's held-out data, or `rate` is
    taken: a first look, which proves nothing."""

    title: str
    says: str
    tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS
    rate: float | None = None


MAIN = (STATIC, DYNAMIC, PAD, RANDOM, CHANNEL)

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "Neighbours",
        "The arms that every claim is held against.",
        ("two domains (16 px)", "sensors (16 px)", "CIFAR-10 (16 px)", "Fashion-MNIST (16 px)"),
        MAIN,
    ),
    Experiment(
        "Ideas, a first look",
        "One seed and one rate: differences of under half a point are within chance. What they came to is in "
        "[the log](decisions/recipe.md).",
        ("two domains (16 px)", "CIFAR-10 (16 px)"),
        (STATIC, DYNAMIC, PAD, RANDOM, CHANNEL, *IDEAS),
        seeds=(0,),
        rate=0.01,
    ),
)
