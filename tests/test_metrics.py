"""Metrics against scikit-learn and scipy, and `evaluate` as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from padconvert.errors import FileError, PolicyError, VerificationError
from padconvert.finetune.data.examples import TensorExamples
from padconvert.finetune.data.preparation import Preparation, Prepared
from padconvert.finetune.evaluate import evaluate, judge
from padconvert.finetune.metrics import OF_CLASSES, OF_VALUES, metrics_for

sk = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def in_pieces(metric: Any, predicted: Tensor, labels: Tensor, size: int) -> float:
    for guess, label in zip(predicted.split(size), labels.split(size), strict=True):
        metric.update(guess, label)
    return float(metric.value())


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(pairs, st.integers(1, 7))
def test_class_metrics_are_scikit_learns_in_any_pieces(found: list[tuple[int, int]], size: int) -> None:
    predicted, labels = torch.tensor(found).T
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "matthews": sk.matthews_corrcoef(labels, predicted) if len(set(found)) > 1 else 0.0,
        "f1": sk.f1_score(
            labels,
            predicted,
            average="binary" if {*predicted.tolist(), *labels.tolist()} <= {0, 1} else "macro",
            zero_division=0.0,
        ),
    }
    for name, value in expected.items():
        assert in_pieces(OF_CLASSES[name](), predicted, labels, size) == pytest.approx(value, abs=1e-12)


@given(st.integers(2, 40), st.integers(1, 7), st.integers(0, 99))
def test_value_metrics_are_numpys_and_scipys_in_any_pieces(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, labels = 1e4 + rng.normal(size=count), rng.normal(size=count) - 1e4  # small spreads around large means
    given_ = torch.from_numpy(predicted), torch.from_numpy(labels)
    assert in_pieces(OF_VALUES["pearson"](), *given_, size) == pytest.approx(
        np.corrcoef(predicted, labels)[0, 1], abs=1e-9
    )
    ranked = rng.integers(0, 6, size=(2, count)).astype(np.float64)  # with ties, as ratings have
    if (ranked != ranked[:, :1]).any(1).all():
        expected = stats.spearmanr(*ranked).statistic
        found = in_pieces(OF_VALUES["spearman"](), torch.from_numpy(ranked[0]), torch.from_numpy(ranked[1]), size)
        assert found == pytest.approx(expected, abs=1e-12)
    assert in_pieces(OF_VALUES["mse"](), *given_, size) == pytest.approx(((predicted - labels) ** 2).mean(), rel=1e-12)


def test_constant_sides_have_no_correlation() -> None:
    ones, ramp = torch.ones(4), torch.arange(4.0)
    assert in_pieces(OF_VALUES["pearson"](), ones, ramp, 2) == 0.0
    assert in_pieces(OF_VALUES["spearman"](), ones, ramp, 2) == 0.0
    assert in_pieces(OF_CLASSES["matthews"](), ones.long(), ramp.long(), 2) == 0.0


def test_metrics_are_chosen_by_the_labels() -> None:
    assert list(metrics_for(torch.tensor([1]), ())) == ["accuracy"]
    assert list(metrics_for(torch.tensor([1]), ["f1", "accuracy"])) == ["accuracy", "f1"]
    assert list(metrics_for(torch.tensor([1.0]), ["pearson"])) == ["mse", "pearson"]
    with pytest.raises(
        PolicyError, match=r"metric 'f1' does not apply to floating labels\. Choose from mse, pearson, spearman"
    ):
        metrics_for(torch.tensor([1.0]), ["pearson", "f1"])


class Reader(nn.Module):
    """Its output is its input, times a parameter that is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one


LOGITS = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    numbers = evaluate(Reader(), TensorExamples(LOGITS, LABELS), batch_size, metrics=("matthews",))
    assert list(numbers) == ["loss", "accuracy", "matthews"]
    assert numbers["accuracy"] == int((LOGITS.argmax(1) == LABELS).sum()) / 23
    assert numbers["matthews"] == pytest.approx(sk.matthews_corrcoef(LABELS, LOGITS.argmax(1)), abs=1e-12)
    assert numbers["loss"] == pytest.approx(functional.cross_entropy(LOGITS, LABELS).item(), rel=1e-5)


def test_dense_and_ignored_labels() -> None:
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1)
    labels[0] = -100  # a batch without any label that counts
    labels[1, 0] = (labels[1, 0] + 1) % 4
    numbers = evaluate(Reader(), TensorExamples(logits, labels), 1)
    assert numbers["accuracy"] == 14 / 15
    used = labels.flatten() >= 0
    expected = functional.cross_entropy(logits.movedim(1, -1).reshape(-1, 4)[used], labels.flatten()[used])
    assert numbers["loss"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(FileError, match="every label is -100"):
        evaluate(Reader(), TensorExamples(logits, torch.full_like(labels, -100)), 2)


def rights(logits: Tensor, labels: Tensor, batch_size: int) -> list[float]:
    found = judge(Reader(), TensorExamples(logits, labels), batch_size).right_N
    assert found is not None
    values: list[float] = found.tolist()
    return values


def test_which_examples_were_right() -> None:
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1)
    labels[0] = -100  # no label counts: left out
    labels[1] = torch.tensor([-100, (labels[1, 1] + 1) % 4, labels[1, 2]])
    labels[4] = (labels[4] + 1) % 4
    assert rights(logits, labels, 4) == [0.5, 1, 1, 0, 1]
    assert rights(LOGITS, LABELS, 7) == (LOGITS.argmax(1) == LABELS).double().tolist()
    assert judge(Reader(), TensorExamples(LOGITS[:, :1], LOGITS[:, 1]), 4).right_N is None


def test_a_floating_label_of_minus_100_counts() -> None:
    assert evaluate(Reader(), TensorExamples(torch.zeros(4, 1), torch.full((4,), -100.0)), 4)["mse"] == 10_000


def test_values_and_no_labels() -> None:
    outputs, targets = LOGITS[:, :1], LOGITS[:, 1]
    numbers = evaluate(Reader(), TensorExamples(outputs, targets), 4, metrics=("pearson",))
    assert numbers["mse"] == pytest.approx((outputs[:, 0] - targets).square().mean().item(), rel=1e-6)
    assert numbers["pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], targets)[0, 1], abs=1e-6)
    assert evaluate(Reader(), TensorExamples(outputs), 4) == {}


def test_examples_bring_the_metrics_of_their_task() -> None:
    numbers = evaluate(Reader(), Prepared(TensorExamples(LOGITS, LABELS), Preparation(), ("matthews", "f1")), 8)
    assert list(numbers) == ["loss", "accuracy", "matthews", "f1"]
    assert numbers["f1"] == pytest.approx(sk.f1_score(LABELS, LOGITS.argmax(1), average="macro"), abs=1e-12)


def test_inputs_take_the_models_dtype() -> None:
    assert evaluate(Reader().half(), TensorExamples(LOGITS.double(), LABELS), 8)["accuracy"] > 0


def test_modes_are_restored_and_nothing_is_recorded() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(5, affine=True), Reader())
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = evaluate(model, TensorExamples(LOGITS, LABELS), 8)
    assert first == evaluate(model, TensorExamples(LOGITS, LABELS), 8)  # no dropout
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modes_are_restored_after_an_error() -> None:
    model = Reader().train()
    bad = LOGITS.clone()
    bad[12, 3] = torch.inf
    with pytest.raises(VerificationError, match="not finite on examples 8 to 15"):
        evaluate(model, TensorExamples(bad, LABELS), 8)
    assert model.training


def test_labels_of_another_model() -> None:
    with pytest.raises(FileError, match="label 5 is out of range: the model has 5 outputs"):
        evaluate(Reader(), TensorExamples(LOGITS, torch.full((23,), 5)), 8)
