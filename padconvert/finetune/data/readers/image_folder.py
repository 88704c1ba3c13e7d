"""A folder of images: one folder per class, or images alone where there are no labels.

Pillow reads them, not `datasets`: its image folders take class folders named `train` or `test` for splits, drop the
others in silence, and read names with brackets as patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from padconvert.errors import FileError
from padconvert.finetune.data.examples import Examples
from padconvert.finetune.data.extras import needed
from padconvert.finetune.data.images import ImageExamples, Picture
from padconvert.finetune.data.spec import DataPolicy

TAKES = "a folder with one folder of images per class"


def matches(ref: str) -> bool:
    return Path(ref).is_dir()


def read(refs: Sequence[str], spec: DataPolicy) -> Examples:
    """The images of all folders; classes are numbered by the sorted names of the class folders.

    Raises `FileError`: no images, images both in and beside class folders, or folders with different classes.
    """
    needed("PIL.Image", refs[0]).init()
    folders = [Path(ref) for ref in refs]
    class_names = _class_names(folders[0])
    for folder in folders[1:]:
        if _class_names(folder) != class_names:
            raise FileError(f"{folder}: has other class folders than {folders[0]}. Both need the same, empty ones too")
    if class_names:
        files = [
            (file, number)
            for folder in folders
            for number, name in enumerate(class_names)
            for file in _images(folder / name)
        ]
    else:
        files = [(file, -1) for folder in folders for file in _images(folder)]
    if not files:
        raise FileError(f"{refs[0]}: holds no images. Name a folder with one folder of images per class")
    pictures = [Picture(file, str(file)) for file, _ in files]
    labels = torch.tensor([number for _, number in files]) if class_names else None
    return ImageExamples(pictures, labels, class_names or None, spec.size)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != "."))
    loose = next((file for file in sorted(folder.iterdir()) if _is_image(file)), None)
    if names and loose:
        raise FileError(f"{loose}: lies beside the class folders of {folder}. Move it into one of them")
    return names


def _images(folder: Path) -> list[Path]:
    """All images below `folder`, sorted by path."""
    return sorted(file for file in folder.rglob("*") if _is_image(file))


def _is_image(file: Path) -> bool:
    from PIL import Image

    return file.name[0] != "." and file.suffix.lower() in Image.registered_extensions() and file.is_file()
