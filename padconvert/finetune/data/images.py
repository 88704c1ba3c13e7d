"""Images that stay in their files, or in their encoded bytes, until a batch asks for them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.examples import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

# what Pillow calls images with one channel; everything else is read as RGB
_GREY = {"1", "L"}


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded image: a file, or its bytes, and what messages call it."""

    source: Path | bytes
    name: str


class ImageExamples:
    """Images decoded as asked for: uint8 [B, C, H, W], C = 1 where all are grey, else 3 (RGB).

    Every header is read at once, so that a wrong size is found before the first step; raises `FileError`.
    `size` is the (height, width) all images are resized to (bilinear), or None: then all must be of one size.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        labels: Tensor | None,
        class_names: tuple[str, ...] | None,
        size: tuple[int, int] | None,
    ) -> None:
        self.pictures, self.labels, self.class_names = pictures, labels, class_names
        self.mode, self.size = _common_form(pictures, size)

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor) -> Batch:
        numbers = indices.tolist()
        pixels_BCHW = torch.stack([self._pixels(self.pictures[number]) for number in numbers])
        return Batch(pixels_BCHW, None if self.labels is None else self.labels[indices])

    def _pixels(self, picture: Picture) -> Tensor:
        height, width = self.size
        with _opened(picture) as image:
            converted = image.convert(self.mode)
            if converted.size != (width, height):
                converted = converted.resize((width, height), resample=_bilinear())
            pixels = np.array(converted, dtype=np.uint8)
        tensor = torch.from_numpy(pixels)
        return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _common_form(pictures: Iterable[Picture], size: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """(Pillow mode, (height, width)) that all pictures are read in."""
    first: tuple[Picture, tuple[int, int]] | None = None
    grey = True
    for picture in pictures:
        with _opened(picture) as image:
            grey = grey and image.mode in _GREY
            found = (image.height, image.width)
        first = first or (picture, found)
        if size is None and found != first[1]:
            raise FileError(
                f"{picture.name}: is {found[0]} x {found[1]} pixels, {first[0].name} is {first[1][0]} x {first[1][1]}. "
                "Set data.size: [height, width] in the policy to resize all of them"
            )
    assert first is not None, "callers bring at least one picture"
    return "L" if grey else "RGB", size or first[1]


@contextmanager
def _opened(picture: Picture) -> Iterator[Image]:
    """The image with its header read. Whatever fails to decode within becomes a `FileError` with its name."""
    from PIL import Image

    source = io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source
    try:
        with Image.open(source) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise FileError(f"{picture.name}: is not a readable image ({error}). Repair or remove it") from error


def _bilinear() -> int:
    from PIL import Image

    return Image.Resampling.BILINEAR
