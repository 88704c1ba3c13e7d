"""The tasks: data, network, and how long everything trains. A task in its small form runs on two cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.quality import data, nets, text
from padconvert.finetune.data.preparation import Preparation, Prepared

FULL_SIZE = 32  # pixels
Three = tuple[Prepared, Prepared, Prepared]


@dataclass(frozen=True, slots=True)
class Task:
    """`examples` are (train, held out, test). `pretrain` steps make the source of a fresh `network(seed)`, `steps` more
    every arm. `rates` is what an arm may choose its learning rate from, by `metric` on what is held out. Tasks of one
    `family` that train their source alike share it."""

    name: str
    examples: Callable[[], Three]
    network: Callable[[int], nn.Module]
    pretrain: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    ratio: float
    pretrain_rate: float = 0.01
    metric: str = "accuracy"
    family: str = ""
    evaluated: int = 500  # samples at once

    @property
    def source(self) -> list[object]:
        """What a source depends on besides the seed."""
        return [self.family or self.name, self.pretrain, self.pretrain_rate, self.batch]

    @property
    def said(self) -> dict[str, object]:
        """What a result depends on besides the arm, the rate and the seed."""
        return {"pretrain": self.pretrain, "steps": self.steps, "batch": self.batch, "ratio": self.ratio}


def pictures(splits: Callable[[], data.Splits], augment: tuple[str, ...] = ("crop", "flip")) -> Three:
    """Scaled to about −2 to 2; the training pictures augmented."""
    found = splits()
    plain, changed = (Preparation(255.0, (0.45,), (0.25,), each) for each in ((), augment))
    return Prepared(found.train, changed), Prepared(found.held_out, plain), Prepared(found.test, plain)


def _fresh(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def _pictures(pixels: int, name: str, splits: Callable[[int], data.Splits], make: Callable[[], nn.Module]) -> Task:
    """The source has only begun to learn: the static network gains much by training on."""
    small = pixels < FULL_SIZE
    return Task(
        f"{name} ({pixels} px)",
        functools.partial(pictures, functools.partial(splits, pixels)),
        functools.partial(_fresh, make),
        pretrain=4000 if small else 8000,
        steps=2000 if small else 4000,
        batch=64 if small else 128,
        rates=(0.003, 0.01),
        ratio=0.3,
    )


def _finished(task: Task) -> Task:
    """The same from a source that has been trained until little is left for it: what users convert."""
    name = f"{task.name.removesuffix(')')}, finished)"
    return replace(task, name=name, pretrain=4 * task.pretrain, pretrain_rate=0.03, rates=(0.01, 0.03), family=name)


def _long(task: Task) -> Task:
    """The same source trained four times as long, at the rate that all arms chose before."""
    name = f"{task.name.removesuffix(')')}, long)"
    return replace(task, name=name, steps=4 * task.steps, rates=(0.01,))


def _texts(names: tuple[str, ...], steps: int, metric: str = "accuracy") -> Task:
    """The encoder starts as it was published: nothing is trained before but the head. All arms at one usual rate."""
    return Task(
        " + ".join(names) + f" ({steps} steps)", functools.partial(text.examples, names),
        functools.partial(text.network, names), pretrain=0, steps=steps, batch=16, rates=(1e-4,), ratio=0.5,
        metric=metric, evaluated=64,
    )  # fmt: skip


def _transfer(pixels: int) -> Task:
    """The published CIFAR ResNet-20 to Fashion-MNIST: every arm begins with a fresh head."""
    return Task(
        f"ResNet-20 to Fashion-MNIST ({pixels} px)",
        functools.partial(pictures, functools.partial(data.only_fashion, pixels)),
        nets.published_resnet20,
        pretrain=0,
        steps=600 if pixels < FULL_SIZE else 3000,
        batch=64 if pixels < FULL_SIZE else 128,
        rates=(0.003, 0.01),
        ratio=0.3,
    )


def _every() -> Iterator[Task]:
    for pixels in (16, 32):
        for task in (
            _pictures(pixels, "two domains", data.two_domains, lambda: nets.resnet8(20)),
            _pictures(pixels, "sensors", data.sensors, lambda: nets.resnet8(10)),
            _pictures(pixels, "CIFAR-10", data.only_cifar10, lambda: nets.resnet8(10)),
            _pictures(pixels, "Fashion-MNIST", data.only_fashion, lambda: nets.resnet8(10, width=4)),
            _pictures(pixels, "CIFAR-10, mobile", data.only_cifar10, lambda: nets.mobilenet(10)),
        ):
            yield task
            yield _finished(task)
            yield _long(_finished(task))
        yield _transfer(pixels)
    for steps in (120, 480, 1500):
        yield _texts(("SST-2",), steps)
        yield _texts(("CoLA",), steps, metric="matthews")
        yield _texts(("MRPC",), steps)
        yield _texts(("Subj",), steps)
        yield _texts(("SST-2", "CoLA", "MRPC", "Subj"), steps)


TASKS: dict[str, Task] = {task.name: task for task in _every()}
