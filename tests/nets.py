"""Networks of real weights and of the UCI digits. Factories for `--arch nets:NAME`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Arrays = dict[str, NDArray[np.generic]]


class Block(nn.Module):
    """Two 3×3 convolutions; a shortcut without parameters: every second pixel, missing channels zero."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.missing = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing, self.missing))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def resnet20() -> nn.Module:
    """The CIFAR-10 network of He et al. (2016), 0.27 M parameters."""
    return ResNet20()


class FashionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 3)
        self.conv2 = nn.Conv2d(10, 20, 3)
        self.fc1 = nn.Linear(500, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


def fashion_net() -> nn.Module:
    return FashionNet()


class ONet(nn.Module):
    """MTCNN's last stage: three heads, PReLU, ceil-mode pooling, columns flattened before rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x)).transpose(1, 3).flatten(1)
        x = self.prelu5(self.dense5(x))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


def onet() -> nn.Module:
    return ONet()


def digits_net() -> nn.Sequential:
    """Small enough that two kinds of digits are too much for it."""
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    for stride in (2, 1):
        layers += [nn.Conv2d(6, 6, 3, stride, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


def digits() -> tuple[Arrays, Arrays]:
    """Training and test images as two sensors see them: as they are; inverted and blurred."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(flat.reshape(-1, 1, 8, 8) / 16).float()
    second = F.avg_pool2d(F.pad(1 - images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    order = np.random.default_rng(0).permutation(len(images))

    def seen_by_both(rows: NDArray[np.int64]) -> Arrays:
        return {"x": torch.cat([images[rows], second[rows]]).numpy(), "y": np.concatenate([labels[rows]] * 2)}

    return seen_by_both(order[600:]), seen_by_both(order[:600])


def fit(model: nn.Module, data: Arrays, steps: int, lr: float = 0.01) -> None:
    """A plain training loop: what a user did before the model is converted. Ends in eval mode."""
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
