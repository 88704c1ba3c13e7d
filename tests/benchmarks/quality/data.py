"""The study's pictures: CIFAR-10, Fashion-MNIST, and mixtures of both as several domains in one task.

All are [N, 3, S, S] uint8; S is 32, or 16 where 2×2 pixels are averaged so that a run fits a small machine.
"""

from __future__ import annotations

import functools
import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from padconvert.finetune.data.examples import TensorExamples

HELD_OUT = 0.1  # of the training pictures: what learning rates are chosen on


@dataclass(frozen=True, slots=True)
class Pictures:
    x: Tensor
    y: Tensor

    def joined(self, other: Pictures) -> Pictures:
        return Pictures(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True, slots=True)
class Splits:
    """`held_out` is part of the training pictures; nothing is chosen on `test`."""

    train: TensorExamples
    held_out: TensorExamples
    test: TensorExamples


def folder() -> Path:
    """Where the data lie: `PADCONVERT_DATA`, or `../shared/data` beside the repository."""
    found = Path(os.environ.get("PADCONVERT_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
    if not found.is_dir():
        raise SystemExit(
            f"there are no data at {found}: name their folder with PADCONVERT_DATA (docs/results.md says what)"
        )
    return found


def splits(train: Pictures, test: Pictures) -> Splits:
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))
    held, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    classes = int(train.y.max()) + 1

    def examples(x: Tensor, y: Tensor) -> TensorExamples:
        return TensorExamples(x, y, classes)

    return Splits(
        examples(train.x[kept], train.y[kept]), examples(train.x[held], train.y[held]), examples(test.x, test.y)
    )


@functools.cache
def cifar10(part: str, pixels: int) -> Pictures:
    names = ("train_0", "train_1") if part == "train" else ("test",)
    files = [np.load(folder() / "cifar10" / f"{name}.npz") for name in names]
    x = torch.from_numpy(np.concatenate([file["x"] for file in files])).movedim(-1, 1)
    return Pictures(_sized(x, pixels), torch.from_numpy(np.concatenate([file["y"] for file in files])).long())


@functools.cache
def fashion(part: str, pixels: int, most: int = 20_000) -> Pictures:
    """Fashion-MNIST in three equal channels, as many training pictures as CIFAR-10 has here."""
    name = "train" if part == "train" else "t10k"
    where = folder() / "fashion_mnist"
    grey = np.frombuffer(gzip.decompress((where / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((where / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    x = torch.from_numpy(grey.reshape(-1, 1, 28, 28)[:most].copy()).expand(-1, 3, -1, -1)
    return Pictures(_sized(F.pad(x, (2, 2, 2, 2)), pixels), torch.from_numpy(labels[:most].copy()).long())


def _sized(x: Tensor, pixels: int) -> Tensor:
    return x.contiguous() if pixels == x.shape[-1] else F.avg_pool2d(x.float(), x.shape[-1] // pixels).byte()


def only_cifar10(pixels: int) -> Splits:
    return splits(cifar10("train", pixels), cifar10("test", pixels))


def only_fashion(pixels: int) -> Splits:
    return splits(fashion("train", pixels), fashion("test", pixels))


def two_domains(pixels: int) -> Splits:
    """CIFAR-10 ∪ Fashion-MNIST: 20 classes."""

    def both(part: str) -> Pictures:
        other = fashion(part, pixels)
        return cifar10(part, pixels).joined(Pictures(other.x, other.y + 10))

    return splits(both("train"), both("test"))


def sensors(pixels: int) -> Splits:
    """CIFAR-10 as four sensors see it, the classes the same: in colour, as a negative, its edges, and by night.

    Every picture is seen by one of them.
    """
    train, test = cifar10("train", pixels), cifar10("test", pixels)
    seen = torch.cat([_seen_by(sensor, train.x[sensor::4]) for sensor in range(4)])
    train = Pictures(seen, torch.cat([train.y[sensor::4] for sensor in range(4)]))
    every = torch.cat([_seen_by(sensor, test.x[sensor::4]) for sensor in range(4)])
    return splits(train, Pictures(every, torch.cat([test.y[sensor::4] for sensor in range(4)])))


def _seen_by(sensor: int, x: Tensor) -> Tensor:
    values = x.float()
    match sensor:
        case 0:
            return x
        case 1:
            return 255 - x
        case 2:
            grey = values.mean(1, keepdim=True)
            across, down = grey - grey.roll(1, -1), grey - grey.roll(1, -2)
            return (4 * (across.abs() + down.abs())).clamp(0, 255).byte().expand(-1, 3, -1, -1)
        case _:
            night = (values / 255) ** 2 * 60
            noise = torch.randn(night.shape, generator=torch.Generator().manual_seed(0)) * 6
            return (night + noise).clamp(0, 255).byte()
