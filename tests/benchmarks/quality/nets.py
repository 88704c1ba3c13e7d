"""Under-capacity networks for the study: there has to be something left to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.data import folder
from padconvert.load import open_source


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut without parameters: strided pixels, missing channels zero."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.missing = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1 or self.missing:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet8(classes: int, width: int = 8) -> nn.Sequential:
    """The CIFAR ResNet of He et al. (2015), one block a stage and half as wide: 19,548 parameters for 20 classes."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class Inverted(nn.Module):
    """MobileNetV2's block (Sandler et al., 2018): widen, filter depthwise, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int = 4) -> None:
        super().__init__()
        hidden = inputs * widen
        self.widen = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.filter = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.filter(self.widen(x)))
        return x + out if self.added else out


def mobilenet(classes: int) -> nn.Sequential:
    """Like MobileNetV2, for small pictures."""
    stem = [nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
    blocks = [Inverted(12, 12, 1), Inverted(12, 20, 2), Inverted(20, 20, 1), Inverted(20, 32, 2)]
    head = [nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(96, classes))


def published_resnet20(seed: int) -> nn.Module:
    """The ResNet-20 that was published for CIFAR-10 (91.73 % there), its head fresh, for other pictures."""
    source = open_source(folder() / "weights" / "resnet20-12fca82f.th", arch="nets:resnet20", hash=False)
    assert source.module is not None
    head = source.module.get_submodule("linear")
    assert isinstance(head, nn.Linear)
    torch.manual_seed(seed)
    head.reset_parameters()
    return source.module
