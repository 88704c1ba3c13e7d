"""The tasks: data, network, and how long everything trains. A task in its small form runs on two cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from benchmarks.quality import data, nets
from padconvert.finetune.data.preparation import Preparation, Prepared


@dataclass(frozen=True, slots=True)
class Task:
    """`pretrain` steps make the source, `steps` more every arm. `rates` is what an arm may choose its rate from."""

    name: str
    splits: Callable[[], data.Splits]
    network: Callable[[], nn.Module]
    pretrain: int
    steps: int
    batch: int = 128
    rates: tuple[float, ...] = (0.003, 0.01)
    pretrain_rate: float = 0.01
    augment: tuple[str, ...] = ("crop", "flip")
    ratio: str = "0.3"

    @property
    def preparation(self) -> Preparation:
        return Preparation(255.0, (0.45,), (0.25,), self.augment)

    def prepared(self) -> tuple[Prepared, Prepared, Prepared]:
        """(train, held out, test)."""
        found = self.splits()
        plain = Preparation(255.0, (0.45,), (0.25,))
        return Prepared(found.train, self.preparation), Prepared(found.held_out, plain), Prepared(found.test, plain)

    @property
    def said(self) -> dict[str, object]:
        """What a result depends on besides the arm, the rate and the seed."""
        return {"pretrain": self.pretrain, "steps": self.steps, "batch": self.batch, "ratio": self.ratio}


def _small(name: str, splits: Callable[[], data.Splits], network: Callable[[], nn.Module]) -> Task:
    return Task(f"{name} (16 px)", splits, network, pretrain=4000, steps=2000, batch=64)


def _full(name: str, splits: Callable[[], data.Splits], network: Callable[[], nn.Module]) -> Task:
    return Task(name, splits, network, pretrain=8000, steps=4000)


def _every() -> Iterator[Task]:
    for make, pixels in ((_small, 16), (_full, 32)):
        cifar = functools.partial(data.one_domain, "cifar10", pixels)
        fashion = functools.partial(data.one_domain, "fashion", pixels)
        yield make("two domains", functools.partial(data.two_domains, pixels), lambda: nets.resnet8(20))
        yield make("sensors", functools.partial(data.sensors, pixels), lambda: nets.resnet8(10))
        yield make("CIFAR-10", cifar, lambda: nets.resnet8(10))
        yield make("Fashion-MNIST", fashion, lambda: nets.resnet8(10, width=4))
        yield make("CIFAR-10, mobile", cifar, lambda: nets.mobilenet(10))


TASKS: dict[str, Task] = {task.name: task for task in _every()}
