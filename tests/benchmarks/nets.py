"""The networks of the tables, written from their papers: ResNet-18/50 (He et al., 2015), MobileNetV2 (Sandler et al.,
2018), with the parameter counts that are published for them; and a plain one of a wanted size."""

from __future__ import annotations

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, as everywhere here."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """relu(inner(x) + shortcut(x)); the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, inner: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = inner
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else _conv(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.inner(x) + self.shortcut(x))
        return out


def _basic(inputs: int, width: int, stride: int) -> Residual:
    inner = nn.Sequential(_conv(inputs, width, 3, stride), nn.ReLU(), _conv(width, width, 3))
    return Residual(inner, inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> Residual:
    first, second = _conv(inputs, width, 1), _conv(width, width, 3, stride)
    inner = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), _conv(width, 4 * width, 1))
    return Residual(inner, inputs, 4 * width, stride)


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            stride = 2 if stage and not i else 1
            block = (_bottleneck if bottleneck else _basic)(channels, 64 << stage, stride)
            channels = (64 << stage) * (4 if bottleneck else 1)
            layers.append(block)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)).eval()


def resnet18() -> nn.Sequential:
    """11,689,512 parameters."""
    return _resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> nn.Sequential:
    """25,557,032 parameters; the stride is in the 3×3 convolution, as everybody has it since."""
    return _resnet((3, 4, 6, 3), bottleneck=True)


class Inverted(nn.Module):
    """Widen, filter depthwise, narrow; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        hidden = inputs * widen
        first = [_conv(inputs, hidden, 1), nn.ReLU6()] if widen > 1 else []
        filtered = [_conv(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.inner = nn.Sequential(*first, *filtered, _conv(hidden, outputs, 1))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return x + out if self.added else out


def mobilenet_v2() -> nn.Sequential:
    """3,504,872 parameters."""
    layers: list[nn.Module] = [_conv(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    for widen, outputs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(count):
            layers.append(Inverted(channels, outputs, stride if not i else 1, widen))
            channels = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, _conv(channels, 1280, 1), nn.ReLU6(), *head).eval()


def wide(layers: int = 1, width: int = 512) -> nn.Sequential:
    """3×3 convolutions of one width: 4 · 9 · width² bytes each, whatever the wanted size of the file."""
    inner = [m for _ in range(layers) for m in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *inner, *head)
