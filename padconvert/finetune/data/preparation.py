"""From raw examples to what a model reads: augment, scale, standardise. Shapes: B batch, C channels, H, W."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from padconvert.errors import PolicyError
from padconvert.finetune.data.examples import Batch, Examples, known_class_names, known_labels
from padconvert.finetune.data.spec import DataPolicy

AUGMENTATIONS = ("crop", "flip")


@dataclass(frozen=True, slots=True)
class Preparation:
    """(x / scale − mean) / std per channel (axis 1) in fp32, after `augment` on the raw values.

    8-bit inputs always become fp32. Wider integers do only when there is something to compute: else they are
    numbers of tokens and stay integers. Floating inputs keep a half or double precision they came in.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether values stay as they are."""
        return self.scale == 1.0 and not self.mean and not self.std

    def augmented(self, raw: Tensor, generator: Generator) -> Tensor:
        """`raw` [B, C, H, W] shifted by a few pixels over zeros (`crop`) and mirrored (`flip`), each at random."""
        if "crop" in self.augment:
            raw = _crop(raw, generator)
        if "flip" in self.augment:
            flipped = torch.rand(len(raw), generator=generator) < 0.5
            raw = torch.where(flipped.view(-1, 1, 1, 1), raw.flip(-1), raw)
        return raw

    def values(self, raw: Tensor) -> Tensor:
        """The prepared values of `raw` [B, C, …], contiguous."""
        if raw.dtype == torch.uint8 or (not self.is_plain and not raw.is_floating_point()):
            raw = raw.float()
        if self.is_plain:
            return raw.contiguous()
        dtype = raw.dtype
        value = raw.to(torch.promote_types(dtype, torch.float32)) / self.scale
        value = value - _per_channel(self.mean, value) if self.mean else value
        value = value / _per_channel(self.std, value) if self.std else value
        return value.to(dtype).contiguous()


class Prepared:
    """Raw `examples` together with how a batch of them is prepared, and the `metrics` that their task is judged by.

    Is itself `Examples`. Integers stay as they are unless they are pixels (see `Preparation`).

    Raises `PolicyError` where the policy's `data:` block cannot apply to examples of this form.
    """

    def __init__(self, examples: Examples, preparation: Preparation, metrics: tuple[str, ...] = ()) -> None:
        self.raw, self.preparation, self.metrics = examples, preparation, metrics
        sample = examples.batch(torch.zeros(1, dtype=torch.int64))
        _require_fit(preparation, sample)
        self.labelled = sample.labels is not None

    @property
    def num_classes(self) -> int | None:
        return self.raw.num_classes

    @property
    def labels(self) -> Tensor | None:
        """All labels where they are known without reading the inputs."""
        return known_labels(self.raw)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return known_class_names(self.raw)

    @property
    def augments(self) -> bool:
        """Whether `pair` gives two different batches."""
        return bool(self.preparation.augment)

    def __len__(self) -> int:
        return len(self.raw)

    def batch(self, indices: Tensor) -> Batch:
        return self._prepared(self.raw.batch(indices))

    def pair(self, indices: Tensor, generator: Generator) -> tuple[Batch, Batch]:
        """The examples `indices`, clean and augmented. Without augmentation both are the same object."""
        raw = self.raw.batch(indices)
        clean = self._prepared(raw)
        if not self.augments or not isinstance(raw.inputs, Tensor):
            return clean, clean
        changed = Batch(self.preparation.augmented(raw.inputs, generator), raw.labels)
        return clean, self._prepared(changed)

    def _prepared(self, raw: Batch) -> Batch:
        values = self.preparation.values
        if isinstance(raw.inputs, Tensor):
            return Batch(values(raw.inputs), raw.labels)
        return Batch({name: values(tensor) for name, tensor in raw.inputs.items()}, raw.labels)


def preparation_of(spec: DataPolicy) -> Preparation:
    """The preparation that a policy's `data:` block asks for. Raises `PolicyError`."""
    unknown = sorted(set(spec.augment) - set(AUGMENTATIONS))
    if unknown:
        raise PolicyError(f"data.augment: {unknown[0]!r} is unknown. Choose from {', '.join(AUGMENTATIONS)}")
    if spec.scale == 0 or 0 in spec.std:
        raise PolicyError("data.scale, data.std: 0 cannot divide. Leave them out where nothing is to be scaled")
    return Preparation(float(spec.scale), tuple(spec.mean), tuple(spec.std), tuple(spec.augment))


def seeded(*numbers: int) -> Generator:
    """A generator whose stream is a function of `numbers` (each ≥ 0), unrelated between different ones."""
    # the count first, because trailing zeros do not change a SeedSequence
    state = np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _crop(raw_BCHW: Tensor, generator: Generator) -> Tensor:
    """Each image shifted by up to 4 pixels (1/8 of the shorter side at most); what comes in is zero."""
    count, _, height, width = raw_BCHW.shape
    margin = min(4, max(1, min(height, width) // 8))
    padded = torch.nn.functional.pad(raw_BCHW, (margin, margin, margin, margin))
    offset_2B = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
    row_BH = offset_2B[0, :, None] + torch.arange(height)
    column_BW = offset_2B[1, :, None] + torch.arange(width)
    sample_B11 = torch.arange(count).view(-1, 1, 1)
    cropped_BHWC = padded[sample_B11, :, row_BH[:, :, None], column_BW[:, None, :]]
    return cropped_BHWC.permute(0, 3, 1, 2)


def _per_channel(numbers: tuple[float, ...], value: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=value.dtype).view(-1, *[1] * (value.ndim - 2))


def _require_fit(preparation: Preparation, sample: Batch) -> None:
    inputs = sample.inputs
    if not isinstance(inputs, Tensor):
        if not preparation.is_plain or preparation.augment:
            raise PolicyError("data: scale, mean, std and augment need examples with one input, these have several")
        return
    if preparation.augment and inputs.ndim != 4:
        raise PolicyError(f"data.augment: needs images [C, H, W], these examples are {list(inputs.shape[1:])}")
    for name, numbers in (("mean", preparation.mean), ("std", preparation.std)):
        if numbers and inputs.ndim < 2:
            raise PolicyError(f"data.{name}: needs channels, these examples are single numbers")
        if numbers and len(numbers) not in (1, inputs.shape[1]):
            raise PolicyError(
                f"data.{name}: has {len(numbers)} numbers, these examples have {inputs.shape[1]} channels "
                f"({list(inputs.shape[1:])}). Give one number per channel, or set data.layout to nhwc"
            )
