"""The demo's source: a small network trained on handwritten digits that two different sensors see.

Writes model.pt, train.npz, test.npz and padconvert.yaml into the folder named on the command line. The digits are the
UCI ones that scikit-learn carries (1,797 real 8×8 images). The second sensor sees them inverted and blurred. One
network for two kinds of input is where weights that follow the input pay.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

Images = NDArray[np.float32]
Examples = dict[str, NDArray[np.generic]]

SEED = 0
N_TEST = 797  # images
EPOCHS = 40
BATCH = 64

POLICY = """\
# What `padconvert convert` uses when it is called in this folder.
version: 1
extends: paper
train: {steps: 1000, lr: 0.005, compare: true}
data: {train: [train.npz], eval: [test.npz]}
"""


def second_sensor(images: Images) -> Images:
    """Inverted, then blurred with a 3×3 binomial kernel. [N, 1, 8, 8] in and out, values 0 to 1."""
    padded = np.pad(1 - images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    return blurred.astype(np.float32)


def seen_by_both(images: Images, labels: NDArray[np.int64]) -> Examples:
    return {
        "x": np.concatenate([images, second_sensor(images)]),
        "y": np.concatenate([labels, labels]),
    }


def seen_by_one(images: Images, labels: NDArray[np.int64]) -> Examples:
    """Every second image by the other sensor. Two views of one image are no two examples of a test."""
    x = images.copy()
    x[1::2] = second_sensor(images[1::2])
    return {"x": x, "y": labels}


def digits() -> tuple[Examples, Examples]:
    """Training data under both sensors, and test data under one. An image is in one of the two only."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    labels = labels.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(images))
    test, train = order[:N_TEST], order[N_TEST:]
    return seen_by_both(images[train], labels[train]), seen_by_one(images[test], labels[test])


def network(width: int = 4) -> nn.Sequential:
    """Deliberately small, so that there is something left to gain."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for stride in (1, 2, 1):
        layers += [nn.Conv2d(width, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def train(model: nn.Module, data: Examples) -> None:
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * (len(x) // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    train_data, test_data = digits()
    model = network()
    train(model, train_data)
    torch.save(model, folder / "model.pt")
    np.savez(folder / "train.npz", x=train_data["x"], y=train_data["y"])
    np.savez(folder / "test.npz", x=test_data["x"], y=test_data["y"])
    (folder / "padconvert.yaml").write_text(POLICY, encoding="utf-8")
    with torch.no_grad():
        right = (model(torch.from_numpy(test_data["x"])).argmax(1).numpy() == test_data["y"]).mean()
    print(f"{folder / 'model.pt'}: trained, {right:.1%} of {len(test_data['y'])} test images right")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
