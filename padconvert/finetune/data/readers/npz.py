"""NumPy archives: arrays `x` and `y`, or the names that the policy gives."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.arrays import NUMBERS, concatenated, from_array_file, numeric
from padconvert.finetune.data.examples import Examples, TensorExamples
from padconvert.finetune.data.spec import DataPolicy

TAKES = ".npz (NumPy arrays)"


def matches(ref: str) -> bool:
    return Path(ref).suffix.lower() == ".npz"


def read(refs: Sequence[str], spec: DataPolicy) -> Examples:
    """The arrays of all files, one after the other. Pickled arrays are never read. Raises `FileError`."""
    paths = [Path(ref) for ref in refs]
    return concatenated([_read_one(path, spec) for path in paths], paths)


def _read_one(path: Path, spec: DataPolicy) -> TensorExamples:
    try:
        # a bare .npy would open too, as an array
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            return from_array_file(_Archive(arrays, path), path, spec)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"{path}: is not a readable .npz archive ({error}). Write it with numpy.savez") from error


class _Archive:
    """An open .npz file as an `ArrayFile`."""

    def __init__(self, arrays: Any, path: Path) -> None:
        self.arrays, self.path = arrays, path

    def keys(self) -> Iterable[str]:
        return list(self.arrays.files)

    def tensor(self, key: str) -> Tensor:
        try:
            array = self.arrays[key]
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            raise FileError(f"{self.path}: '{key}' holds Python objects, which are never read. {NUMBERS}") from error
        return numeric(array, f"{self.path}: '{key}'")
