"""What a model is judged by. Counts are integers and sums are fp64, so the batch size does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from padconvert.errors import PolicyError


class Metric(Protocol):
    """Gathers batches. `value` needs at least one."""

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Class metrics: class numbers, both int64 [N]. Metrics of values: numbers, both floating [N]."""

    def value(self) -> float: ...


class Accuracy:
    """The share of right class numbers, 0 to 1."""

    def __init__(self) -> None:
        self.right, self.count = 0, 0

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        self.right += int((predicted == labels).sum())
        self.count += len(labels)

    def value(self) -> float:
        return self.right / self.count


class _Confusion:
    """How often class i was predicted as j, counted for the pairs that occur."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], int] = {}

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        pairs, counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
        for (label, guess), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.counts[label, guess] = self.counts.get((label, guess), 0) + count

    def of_class(self, number: int) -> tuple[int, int, int]:
        """(right, labelled so, predicted so)."""
        labelled = sum(count for (label, _), count in self.counts.items() if label == number)
        predicted = sum(count for (_, guess), count in self.counts.items() if guess == number)
        return self.counts.get((number, number), 0), labelled, predicted

    def classes(self) -> list[int]:
        return sorted({number for pair in self.counts for number in pair})


class Matthews(_Confusion):
    """Matthews' correlation, −1 to 1; for more classes Gorodkin's. 0 where either side is constant."""

    def value(self) -> float:
        rows = [self.of_class(number) for number in self.classes()]
        total, right = sum(self.counts.values()), sum(row[0] for row in rows)
        labelled = total**2 - sum(row[1] ** 2 for row in rows)
        predicted = total**2 - sum(row[2] ** 2 for row in rows)
        covariance = right * total - sum(row[1] * row[2] for row in rows)
        spread = float(labelled) * float(predicted)
        return covariance / spread**0.5 if spread else 0.0


class F1(_Confusion):
    """2 · right / (labelled + predicted), 0 to 1: of class 1 where there are only 0 and 1, else the classes' mean."""

    def value(self) -> float:
        classes = self.classes()
        counted = [1] if set(classes) <= {0, 1} else classes
        return sum(self._of(number) for number in counted) / len(counted)

    def _of(self, number: int) -> float:
        right, labelled, predicted = self.of_class(number)
        return 2 * right / (labelled + predicted) if labelled + predicted else 0.0


class MeanSquaredError:
    """The mean of (predicted − label)², in the label's units squared."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        self.sum += float((predicted.double() - labels.double()).square().sum())
        self.count += len(labels)

    def value(self) -> float:
        return self.sum / self.count


class Pearson:
    """Pearson's correlation, −1 to 1; 0 where either side is constant."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_2 = torch.zeros(2, dtype=torch.float64)
        self.scatter_22 = torch.zeros(2, 2, dtype=torch.float64)  # Σ (v − mean)(v − mean)ᵀ

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        value_2N = torch.stack([predicted.double().cpu(), labels.double().cpu()])
        count = value_2N.shape[1]
        mean_2 = value_2N.mean(1)
        centred_2N = value_2N - mean_2[:, None]
        # Chan's update: a sum of squares alone would lose small spreads around large means
        apart_2 = mean_2 - self.mean_2
        total = self.count + count
        self.scatter_22 += centred_2N @ centred_2N.T + torch.outer(apart_2, apart_2) * (self.count * count / total)
        self.mean_2 += apart_2 * (count / total)
        self.count = total

    def value(self) -> float:
        spread = float(self.scatter_22[0, 0] * self.scatter_22[1, 1])
        return float(self.scatter_22[0, 1]) / spread**0.5 if spread > 0 else 0.0


class Spearman:
    """Pearson's correlation of the ranks, −1 to 1; equal values share their mean rank. Keeps all values."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        self.pieces.append(torch.stack([predicted.double().cpu(), labels.double().cpu()]))

    def value(self) -> float:
        predicted, labels = torch.cat(self.pieces, dim=1)
        of_ranks = Pearson()
        of_ranks.update(_ranks(predicted), _ranks(labels))
        return of_ranks.value()


def _ranks(value_N: Tensor) -> Tensor:
    _, place_N, count_U = value_N.unique(return_inverse=True, return_counts=True)
    rank_U: Tensor = count_U.cumsum(0) - (count_U - 1) / 2
    return rank_U[place_N]


OF_CLASSES: dict[str, type[Metric]] = {"accuracy": Accuracy, "matthews": Matthews, "f1": F1}
OF_VALUES: dict[str, type[Metric]] = {"mse": MeanSquaredError, "pearson": Pearson, "spearman": Spearman}


def metrics_for(labels: Tensor, named: Sequence[str]) -> dict[str, Metric]:
    """Fresh metrics for such labels: accuracy or mse, then the named ones.

    Raises `PolicyError` where one cannot apply.
    """
    known = OF_VALUES if labels.is_floating_point() else OF_CLASSES
    wrong = next((name for name in named if name not in known), None)
    if wrong is not None:
        kind = "floating" if labels.is_floating_point() else "class"
        raise PolicyError(f"metric '{wrong}' does not apply to {kind} labels. Choose from {', '.join(known)}")
    return {name: known[name]() for name in dict.fromkeys([next(iter(known)), *named])}
