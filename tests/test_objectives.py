"""What is minimised and what scores are taken of: values against torch and by hand, and when there is nothing to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from padconvert.errors import FileError, PolicyError
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.objectives import (
    Objective,
    class_axis,
    distill_loss,
    drawn_loss,
    dtype_of,
    forward,
    logits_of,
    task_loss,
)


@dataclass(frozen=True)
class Asked:
    objective: str = "auto"
    distill_weight: float = 0.5


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def noise(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(shape, generator=seed(number))


@pytest.fixture
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


LABELS = torch.tensor([0, 3, 1, 3, 2])


# ---- reading outputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, t + 1),
        lambda t: {"hidden": t + 1, "logits": t},
        lambda t: {"out": t, "aux": t + 1},
        lambda t: {"ids": torch.arange(3), "scores": [t]},
    ],
)
def test_logits_are_found_in_every_kind_of_output(wrap: Callable[[Tensor], Any]) -> None:
    logits = noise(5, 4)
    assert torch.equal(logits_of(wrap(logits)), logits)
    assert task_loss(wrap(logits), LABELS) == functional.cross_entropy(logits, LABELS)


def test_a_transformers_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    logits = noise(5, 4)
    output = outputs.SequenceClassifierOutput(logits=logits, hidden_states=(noise(5, 7, 3),))
    assert torch.equal(logits_of(output), logits)


def test_an_output_without_floats_is_an_error() -> None:
    with pytest.raises(FileError, match="holds no floating-point tensor"):
        logits_of({"ids": torch.arange(3)})


def test_keyword_inputs() -> None:
    class Adds(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    assert forward(Adds(), {"right": torch.ones(2), "left": torch.full((2,), 3.0)}).tolist() == [2.0, 2.0]


def test_dtype_of_inputs(classifier: nn.Module) -> None:
    assert dtype_of(classifier) == torch.float32
    assert dtype_of(classifier.double()) == torch.float64
    assert dtype_of(nn.ReLU()) == torch.float32


# ---- task loss ---------------------------------------------------------------------------------------------------


def test_dense_labels_with_classes_on_axis_1_or_last() -> None:
    logits, labels = noise(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5), generator=seed())
    expected = functional.cross_entropy(logits, labels)
    assert task_loss(logits, labels) == expected
    assert task_loss(logits.permute(0, 2, 3, 1), labels) == expected
    assert class_axis(logits, labels) == 1
    assert class_axis(logits.permute(0, 2, 3, 1), labels) == 3


def test_ignored_labels_do_not_count() -> None:
    logits = noise(5, 4)
    labels = torch.tensor([0, -100, 1, -100, 2])
    used = labels >= 0
    assert torch.isclose(task_loss(logits, labels), functional.cross_entropy(logits[used], labels[used]))


def test_floating_labels_are_targets() -> None:
    outputs, targets = noise(5, 1), noise(5, number=1)
    assert torch.isclose(task_loss(outputs, targets), (outputs[:, 0] - targets).square().mean())
    assert torch.isclose(task_loss(outputs, targets.double()), (outputs[:, 0] - targets).square().mean())


def test_half_precision_is_computed_in_fp32() -> None:
    logits = (noise(5, 4) * 50).half()
    assert task_loss(logits, LABELS).dtype == torch.float32
    assert torch.isclose(task_loss(logits, LABELS), functional.cross_entropy(logits.float(), LABELS))
    other = (noise(5, 4, number=1) * 50).half()
    assert torch.isclose(distill_loss(logits, other), distill_loss(logits.float(), other.float()))


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (noise(5, 4), torch.tensor([0, 1, 2, 3, 4]), "label 4 is out of range: the model has 4 outputs"),
        (noise(5, 4), torch.zeros(5, 2, dtype=torch.int64), r"shape \[5, 2\] do not fit outputs of shape \[5, 4\]"),
        (noise(5), torch.zeros(5, dtype=torch.int64), r"do not fit outputs of shape \[5\]"),
        (noise(5, 4), noise(5), "Class labels have to be whole numbers"),
    ],
)
def test_labels_that_do_not_fit(outputs: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(FileError, match=message):
        task_loss(outputs, labels)


# ---- distillation ------------------------------------------------------------------------------------------------


def test_distillation_of_classes_is_kl() -> None:
    student, teacher = noise(5, 4), noise(5, 4, number=1)
    expected = functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    assert torch.isclose(distill_loss(student, teacher), expected)
    assert distill_loss(teacher, teacher).abs() < 1e-7
    dense = distill_loss(student.T.reshape(1, 4, 5), teacher.T.reshape(1, 4, 5), torch.zeros(1, 5, dtype=torch.int64))
    assert torch.isclose(dense, expected)


def test_distillation_of_values_is_free_of_their_scale() -> None:
    student, teacher = noise(5, 3, 4), noise(5, 3, 4, number=1)
    expected = (student - teacher).square().mean() / teacher.var(correction=0)
    assert torch.isclose(distill_loss(student, teacher), expected)
    assert torch.isclose(distill_loss(1000 * student, 1000 * teacher), expected)
    floats = distill_loss(student[:, :, 0], teacher[:, :, 0], labels=noise(5, 3))
    assert torch.isclose(floats, (student - teacher)[:, :, 0].square().mean() / teacher[:, :, 0].var(correction=0))


def test_a_single_or_constant_value_has_no_variance_to_divide_by() -> None:
    assert distill_loss(torch.tensor([[3.0]]), torch.tensor([[1.0]])) == 4.0
    assert distill_loss(torch.full((4, 1), 3.0), torch.full((4, 1), 1.0)) == 4.0


def test_every_head_is_distilled() -> None:
    teacher = (noise(5, 4), noise(5, 1, number=1))
    moved = (teacher[0], teacher[1] + 1)
    expected = 1 / teacher[1].var(correction=0) / 2
    assert torch.isclose(distill_loss(moved, teacher), expected)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = noise(5, 4).requires_grad_(), noise(5, 4, number=1).requires_grad_()
    distill_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


# ---- drawn labels ------------------------------------------------------------------------------------------------


def test_drawn_labels_follow_the_teachers_softmax() -> None:
    """The expected gradient of cross-entropy against drawn labels is softmax(student) − softmax(teacher)."""
    teacher = torch.tensor([[2.0, 0.0, -1.0]]).repeat(20_000, 1)
    student = torch.zeros(20_000, 3, requires_grad=True)
    drawn_loss(student, teacher, seed()).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad.sum(0), 1 / 3 - teacher[0].softmax(0), atol=0.01)


def test_drawn_losses_are_seeded_and_have_a_gradient_where_models_agree() -> None:
    for outputs in (noise(5, 4), noise(5, 1)):
        student = outputs.clone().requires_grad_()
        loss = drawn_loss(student, outputs, seed(1))
        assert loss == drawn_loss(student, outputs, seed(1)) != drawn_loss(student, outputs, seed(2))
        loss.backward()
        assert student.grad is not None
        assert student.grad.abs().min() > 0


def test_drawn_values_spread_as_the_teachers() -> None:
    teacher = 10 * noise(20_000, 1) + 5
    assert torch.isclose(drawn_loss(teacher, teacher, seed(1)), torch.tensor(1.0), atol=0.05)


# ---- the objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "labelled", "augments", "task", "weight", "trains"),
    [
        (Asked("auto", 0.5), True, False, True, 0.5, True),
        (Asked("auto", 0.0), True, False, True, 0.0, True),
        (Asked("auto", 0.5), False, True, False, 1.0, True),
        (Asked("auto", 0.5), False, False, False, 1.0, False),
        (Asked("task", 0.5), True, True, True, 0.0, True),
        (Asked("both", 0.25), True, True, True, 0.25, True),
        (Asked("distill", 0.5), True, True, False, 1.0, True),
        (Asked("distill", 0.5), True, False, False, 1.0, False),
    ],
)
def test_what_is_asked_and_what_the_data_offers(
    asked: Asked, labelled: bool, augments: bool, task: bool, weight: float, trains: bool
) -> None:
    objective = Objective.of(asked, labelled=labelled, augments=augments)
    assert (objective.task, objective.distill_weight) == (task, weight)
    assert (objective.why_not is None) == trains
    assert objective.needs_teacher == (weight > 0)
    if not trains:
        assert "nothing was trained" in (objective.why_not or "")


@pytest.mark.parametrize("name", ["task", "both"])
def test_a_task_loss_needs_labels(name: str) -> None:
    with pytest.raises(PolicyError, match=f"train.objective: {name} needs labels.*data.label_key"):
        Objective.of(Asked(name), labelled=False, augments=True)


def test_both_needs_a_weight() -> None:
    with pytest.raises(PolicyError, match=r"train\.distill_weight above 0"):
        Objective.of(Asked("both", 0.0), labelled=True, augments=True)


def test_the_student_sees_the_augmented_batch_and_the_teacher_the_clean_one(classifier: nn.Module) -> None:
    teacher = copy.deepcopy(classifier)
    clean, augmented = Batch(noise(5, 6), LABELS), Batch(noise(5, 6, number=1), LABELS)
    student_sees, teacher_sees = classifier(augmented.inputs), classifier(clean.inputs)
    task = functional.cross_entropy(student_sees, LABELS)
    distill = functional.kl_div(student_sees.log_softmax(1), teacher_sees.softmax(1), reduction="batchmean")
    for objective, expected in [
        (Objective(True, 0.0), task),
        (Objective(True, 0.25), task + 0.25 * distill),
        (Objective(False, 1.0), distill),
    ]:
        loss = objective.loss(classifier, teacher, clean, augmented, seed())
        assert torch.isclose(loss, expected)


def test_upcycled_models_learn_from_augmentation_only(classifier: nn.Module) -> None:
    """Student = teacher: plain distillation has no gradient, an augmented student has one."""
    teacher, objective = copy.deepcopy(classifier), Objective(False, 1.0)
    clean, augmented = Batch(noise(5, 6), None), Batch(noise(5, 6, number=1), None)

    def gradient(batch: Batch) -> float:
        classifier.zero_grad()
        objective.loss(classifier, teacher, clean, batch, seed()).backward()
        return sum(float(p.grad.abs().sum()) for p in classifier.parameters() if p.grad is not None)

    assert gradient(clean) < 1e-5
    assert gradient(augmented) > 1e-2


@pytest.mark.parametrize("labels", [LABELS, None])
def test_scoring_losses_are_sums_over_samples(classifier: nn.Module, labels: Tensor | None) -> None:
    """A batch's gradient is the sum of its samples' gradients (with the same draws)."""
    inputs, objective = noise(5, 6), Objective(labels is not None, 0.0 if labels is not None else 1.0)
    teacher = copy.deepcopy(classifier)
    whole = objective.scoring_loss(classifier, teacher, Batch(inputs, labels), seed())
    if labels is not None:
        assert torch.isclose(whole, functional.cross_entropy(classifier(inputs), labels, reduction="sum"))
        singles = [
            objective.scoring_loss(classifier, None, Batch(inputs[i : i + 1], labels[i : i + 1]), seed())
            for i in range(5)
        ]
        assert torch.isclose(whole, torch.stack(singles).sum())
        return
    drawn = torch.multinomial(classifier(inputs).double().softmax(1), 1, generator=seed())[:, 0]
    assert torch.isclose(whole, functional.cross_entropy(classifier(inputs), drawn, reduction="sum"))
    whole.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.parameters())


def test_a_teacher_in_train_mode_is_our_own_mistake(classifier: nn.Module) -> None:
    with pytest.raises(AssertionError, match="train mode"):
        Objective(False, 1.0).loss(
            classifier, copy.deepcopy(classifier).train(), Batch(noise(1, 6), None), Batch(noise(1, 6), None), seed()
        )
