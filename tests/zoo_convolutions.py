"""Small convolutional networks of the zoo. Each class is importable, so that its pickles load."""

# A module's call is untyped in torch.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


class ResNet(nn.Module):
    def __init__(self, widths: Sequence[int] = (8, 16), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = nn.Sequential(BasicBlock(widths[0], widths[0], 1), BasicBlock(widths[0], widths[0], 1))
        self.layer2 = nn.Sequential(BasicBlock(widths[0], widths[1], 2), BasicBlock(widths[1], widths[1], 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_residual = stride == 1 and inputs == outputs
        self.expand = conv_bn(inputs, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.use_residual else out


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 3), InvertedResidual(12, 12, 1, 3)]
        self.features = nn.Sequential(conv_bn(3, 8, 3, 2), *blocks, conv_bn(12, 24, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(functional.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * scale.sigmoid()


class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.se = SqueezeExcite(8, 2)
        self.project = nn.Conv2d(8, 16, 1)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.se(functional.silu(self.depthwise(self.stem(x)))))
        return self.classifier(x.mean((2, 3)))


class UNet(nn.Module):
    """Skip connections over a transposed convolution; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn(3, 8, 3)
        self.down2 = conv_bn(8, 16, 3)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.up_conv = conv_bn(16, 8, 3)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        return self.out(self.up_conv(torch.cat([first, self.up(second)], 1)))


class DilatedAudio(nn.Module):
    """A 1-D network with growing dilation and gated units, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 8, 9, stride=4, padding=4)
        self.filters = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.gates = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for signal, gate in zip(self.filters, self.gates, strict=True):
            x = x + signal(x).tanh() * gate(x).sigmoid()
        return self.head(x.mean(-1))


class SeparableAudio(nn.Module):
    """Depthwise-separable 1-D convolutions, with the head a convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 8, 5, 2)
        self.depthwise = nn.Conv1d(8, 8, 7, padding=3, groups=8)
        self.pointwise = nn.Conv1d(8, 12, 1)
        self.out = nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.pointwise(self.depthwise(functional.relu(self.front(x)))))
        return self.out(functional.adaptive_avg_pool1d(x, 1)).squeeze(-1)


class Video(nn.Module):
    """3-D convolutions, one of them factored into space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 6, 3, (1, 2, 2), 1)
        self.space = nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.time(functional.relu(self.space(functional.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3, 4)))


class DenseNet(nn.Module):
    """Every layer sees the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.classifier = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(functional.relu(norm(x)))], 1)
        return self.classifier(x.mean((2, 3)))


class Inception(nn.Module):
    """Parallel branches of several kernel sizes, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.one = nn.Conv2d(8, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.asymmetric = nn.Sequential(
            nn.Conv2d(8, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 2, 1))
        self.fc = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        joined = torch.cat([branch(x) for branch in (self.one, self.three, self.asymmetric, self.pool)], 1)
        return self.fc(functional.relu(joined).mean((2, 3)))


class SqueezeNet(nn.Module):
    """1x1 squeezes, and no linear layer at all: the head is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.expand1 = nn.Conv2d(4, 8, 1)
        self.expand3 = nn.Conv2d(4, 8, 3, padding=1)
        self.final_conv = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(functional.relu(self.stem(x))))
        x = functional.relu(torch.cat([self.expand1(x), self.expand3(x)], 1))
        return functional.log_softmax(self.final_conv(x).mean((2, 3)), 1)


class ONet(nn.Module):
    """A face network: PReLU, a fixed input size through a flatten, three heads in a dict."""

    def __init__(self) -> None:
        super().__init__()
        pairs = pairwise((3, 8, 12, 12))
        self.features = nn.Sequential(
            *(m for i, o in pairs for m in (nn.Conv2d(i, o, 3), nn.PReLU(o), nn.MaxPool2d(2)))
        )
        self.dense = nn.Linear(12 * 4 * 4, 16)
        self.prelu = nn.PReLU()
        self.face = nn.Linear(16, 2)
        self.box = nn.Linear(16, 4)
        self.landmarks = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.prelu(self.dense(self.features(x).flatten(1)))
        return {"face": self.face(x).softmax(1), "box": self.box(x), "landmarks": self.landmarks(x)}


class GroupedDilated(nn.Module):
    """Groups, dilation, uneven kernels, strides and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=4),
            nn.ReLU(),
            nn.Conv2d(16, 8, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 1), groups=8, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 6, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class PaddingModes(nn.Module):
    """All padding modes, 'same' and 'valid' among them."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = nn.Conv2d(3, 6, 3, padding=1)
        self.reflect = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.replicate = nn.Conv2d(6, 6, 5, padding=(2, 1), padding_mode="replicate")
        self.circular = nn.Conv2d(6, 6, 3, padding=2, padding_mode="circular", groups=2)
        self.same = nn.Conv2d(6, 6, 4, padding="same", dilation=2)
        self.same_reflect = nn.Conv2d(6, 6, 3, padding="same", padding_mode="reflect")
        self.valid = nn.Conv2d(6, 4, 3, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.zeros, self.reflect, self.replicate, self.circular, self.same, self.same_reflect)
        for layer in layers:
            x = layer(x).tanh()
        return self.valid(x)


class Segmentation(nn.Module):
    """A dict of an upsampled map and an auxiliary one, as torchvision's segmentation models give."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 8, 3, 2), conv_bn(8, 12, 3, 2))
        self.classifier = nn.Conv2d(12, 3, 1)
        self.aux_classifier = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        maps = {"out": self.classifier(features), "aux": self.aux_classifier(features)}
        return {k: functional.interpolate(v, x.shape[-2:], mode="bilinear") for k, v in maps.items()}


class Autoencoder(nn.Module):
    """Down with convolutions, up with transposed ones, which have no dynamic form."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)).sigmoid()


def vgg() -> nn.Sequential:
    """One flat Sequential with pooling, dropout and a flatten that fixes the input size at 28."""
    features = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(12 * 4 * 4, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 10), nn.Softmax(1)]
    return nn.Sequential(*features, *head)


class NoBias(nn.Module):
    """Not one bias, GroupNorm instead of BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc1 = nn.Linear(8, 12, bias=False)
        self.fc2 = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm(self.conv1(x)))
        return self.fc2(functional.gelu(self.fc1(self.conv2(x).mean((2, 3)))))
