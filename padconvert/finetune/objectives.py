"""What a fine-tune minimises, and what a partition's scores are taken of.

At upcycling the model computes what its source computes, so plain distillation has no gradient there. The student
therefore reads the augmented batch and the teacher the clean one; without labels, scores are taken with labels drawn
from the teacher's own softmax. Shapes: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from padconvert.errors import FileError, PolicyError
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.data.labels import IGNORED, check_labels
from padconvert.layers.padding import attending
from padconvert.walk.probe import flat_outputs

NOTHING_TO_LEARN = (
    "nothing was trained: without augmentation, distillation asks the model for what it already computes. "
    "Give labels with the data, or set data.augment"
)


class ObjectivePolicy(Protocol):
    """What the objective reads of a policy's `train:` block."""

    @property
    def objective(self) -> str: ...
    @property
    def distill_weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Objective:
    """task · [task loss] + distill_weight · [distillation]; `why_not` says why nothing can be trained, else None."""

    task: bool
    distill_weight: float
    why_not: str | None = None

    @staticmethod
    def of(train: ObjectivePolicy, *, labelled: bool, augments: bool) -> Objective:
        """The objective a policy asks for, given what the data offers.

        `auto` is the task loss (with distillation, unless its weight is 0) where there are labels, else distillation.
        Raises `PolicyError` where the policy asks for what the data lacks.
        """
        chosen = train.objective
        if chosen == "auto":
            chosen = "both" if labelled and train.distill_weight > 0 else "task" if labelled else "distill"
        if chosen in ("task", "both") and not labelled:
            raise PolicyError(
                f"train.objective: {chosen} needs labels, and the data has none. "
                "Name them (data.label_key, data.label_column), or set the objective to distill, with data.augment"
            )
        if chosen == "both" and train.distill_weight == 0:
            raise PolicyError("train.objective: both needs a train.distill_weight above 0. Raise it, or choose task")
        if chosen == "distill":
            return Objective(False, 1.0, None if augments else NOTHING_TO_LEARN)
        return Objective(True, train.distill_weight if chosen == "both" else 0.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether `loss` and `scoring_loss` read a teacher (the source, in eval mode)."""
        return self.distill_weight > 0

    def loss(
        self, model: nn.Module, teacher: nn.Module | None, clean: Batch, augmented: Batch, generator: Generator
    ) -> Tensor:
        """The mean loss of a batch: `model` on the augmented examples, `teacher` on the same ones clean.

        Both batches are on the models' device and in their dtype. Raises `FileError` for labels that do not fit.
        """
        del generator  # no objective draws numbers in training yet
        output = forward(model, augmented.inputs)
        if self.distill_weight == 0:
            return task_loss(output, _labels(augmented))
        distillation = self.distill_weight * distill_loss(output, _taught(teacher, clean), clean.labels)
        return task_loss(output, _labels(augmented)) + distillation if self.task else distillation

    def scoring_loss(self, model: nn.Module, teacher: nn.Module | None, batch: Batch, generator: Generator) -> Tensor:
        """The *sum* over the samples of a clean batch, so that scores do not depend on how samples are batched.

        With a task loss, of that; else of the loss against targets drawn from the teacher's own distribution.
        """
        output = forward(model, batch.inputs)
        if self.task:
            return len(batch) * task_loss(output, _labels(batch))
        return len(batch) * drawn_loss(output, _taught(teacher, batch), generator, batch.labels)


def forward(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Any:
    """The model's output: one tensor is its first argument, several are keywords. An `attention_mask` among them tells
    the layers that route what is padding."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    with attending(inputs.get("attention_mask")):
        return model(**inputs)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model's floating inputs take: that of its first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def heads_of(output: Any) -> list[Tensor]:
    """The tensors of an output that carry a loss: `logits` alone where there are any, else all floating ones."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return [output["logits"]]
    heads = flat_outputs(output)
    if not heads:
        raise FileError(
            f"the model's output ({type(output).__name__}) holds no floating-point tensor. "
            "Give a model that returns a tensor, a tuple or a dict of tensors"
        )
    return heads


def logits_of(output: Any) -> Tensor:
    """The output that labels belong to: `logits`, else the first floating tensor."""
    return heads_of(output)[0]


def task_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy for class numbers ([B, C] with [B], [B, C, …] or [B, …, C] with [B, …]), else squared error.

    The mean over the labels that are not −100; at least in fp32. Raises `FileError` where labels do not fit.
    """
    logits = _precise(logits_of(output))
    if labels.is_floating_point():
        return functional.mse_loss(logits, fitted(labels, logits).to(logits.dtype))
    axis = class_axis(logits, labels)
    check_labels(labels, logits.shape[axis])
    return functional.cross_entropy(logits.movedim(axis, 1), labels, ignore_index=IGNORED)


def distill_loss(student: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) for class logits, else the squared error in units of the teacher's variance.

    The mean over samples and positions, and over the outputs where there are several. `labels` only tell what the
    first output is; without them a [B, C ≥ 2] output counts as class logits.
    """
    pairs = zip(heads_of(student), heads_of(teacher), strict=True)
    losses = []
    for place, (ours, theirs) in enumerate(pairs):
        ours, theirs = _precise(ours), _precise(theirs).detach()
        axis = _logits_axis(theirs, labels if place == 0 else None)
        if axis is None:
            losses.append(functional.mse_loss(ours, theirs) / _variance(theirs))
        else:
            log_ours, log_theirs = ours.log_softmax(axis), theirs.log_softmax(axis)
            losses.append((log_theirs.exp() * (log_theirs - log_ours)).sum(axis).mean())
    return torch.stack(losses).mean()


def drawn_loss(student: Any, teacher: Any, generator: Generator, labels: Tensor | None = None) -> Tensor:
    """As `distill_loss`, against one draw from the teacher's own distribution: its softmax, or for other outputs a
    normal distribution around them with their variance. Its gradient is not zero where student and teacher agree."""
    pairs = zip(heads_of(student), heads_of(teacher), strict=True)
    losses = []
    for place, (ours, theirs) in enumerate(pairs):
        ours, theirs = _precise(ours), _precise(theirs).detach()
        axis = _logits_axis(theirs, labels if place == 0 else None)
        if axis is None:
            noise = torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype).to(theirs.device)
            target = theirs + _variance(theirs).sqrt() * noise
            losses.append(functional.mse_loss(ours, target) / _variance(theirs))
        else:
            losses.append(functional.cross_entropy(ours.movedim(axis, 1), _drawn(theirs, axis, generator)))
    return torch.stack(losses).mean()


def class_axis(logits: Tensor, labels: Tensor) -> int:
    """The axis of the classes: 1 where the labels have the other axes' shape, else the last.

    Raises `FileError` where the labels have neither shape.
    """
    if logits.ndim >= 2 and labels.shape == logits.shape[:1] + logits.shape[2:]:
        return 1
    if logits.ndim >= 2 and labels.shape == logits.shape[:-1]:
        return logits.ndim - 1
    raise FileError(
        f"class labels of shape {list(labels.shape)} do not fit outputs of shape {list(logits.shape)}: "
        "there has to be one class number for each sample, or for each position. Check data.label_key and the model"
    )


def fitted(labels: Tensor, outputs: Tensor) -> Tensor:
    """Floating labels in the shape of the outputs, where they differ by an axis of 1 only. Raises `FileError`."""
    if [size for size in labels.shape[1:] if size > 1] != [size for size in outputs.shape[1:] if size > 1]:
        raise FileError(
            f"floating labels of shape {list(labels.shape)} do not fit outputs of shape {list(outputs.shape)}. "
            "Class labels have to be whole numbers; targets need the shape of the model's output"
        )
    return labels.reshape(outputs.shape)


def _logits_axis(output: Tensor, labels: Tensor | None) -> int | None:
    """The axis of the classes, or None where `output` is no class logits."""
    if labels is None:
        return 1 if output.ndim == 2 and output.shape[1] >= 2 else None
    return None if labels.is_floating_point() else class_axis(output, labels)


def _drawn(logits: Tensor, axis: int, generator: Generator) -> Tensor:
    """One class number for each row of `logits`; drawn on the CPU, so that the device does not matter."""
    probability = logits.movedim(axis, -1).double().cpu().softmax(-1)
    drawn = torch.multinomial(probability.reshape(-1, probability.shape[-1]), 1, generator=generator)
    return drawn.reshape(probability.shape[:-1]).to(logits.device)


def _variance(output: Tensor) -> Tensor:
    """The variance of all entries, or 1 where they hardly differ (a single one, a constant)."""
    variance = output.var(correction=0)
    return torch.where(variance > 1e-6 * output.square().mean(), variance, torch.ones_like(variance))


def _precise(tensor: Tensor) -> Tensor:
    """Half precision as fp32; the rest as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _taught(teacher: nn.Module | None, batch: Batch) -> Any:
    assert teacher is not None, "this objective needs a teacher"
    assert not teacher.training, "a teacher in train mode would move its own statistics"
    with torch.no_grad():
        return forward(teacher, batch.inputs)


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None, "Objective.of refuses a task loss without labels"
    return batch.labels
