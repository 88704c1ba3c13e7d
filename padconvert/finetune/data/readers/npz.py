"""NumPy archives: arrays `x` and `y`, or the names that the policy gives."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.arrays import NUMBERS, concatenated, from_array_file, numeric
from padconvert.finetune.data.examples import Examples, TensorExamples
from padconvert.finetune.data.spec import DataPolicy

TAKES = ".npz (NumPy arrays)"
_END_BYTES = 22  # of a zip directory's last record


def matches(ref: str) -> bool:
    return Path(ref).suffix.lower() == ".npz"


def read(refs: Sequence[str], spec: DataPolicy) -> Examples:
    """The arrays of all files, one after the other. Pickled arrays are never read. Raises `FileError`."""
    paths = [Path(ref) for ref in refs]
    return concatenated([_read_one(path, spec) for path in paths], paths)


def _read_one(path: Path, spec: DataPolicy) -> TensorExamples:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_directory(archive, path)
            return from_array_file(_Archive(archive, path), path, spec)
    except FileError:
        raise
    except Exception as error:  # zipfile, zlib, tokenize and NumPy each raise their own on damaged bytes
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{path}: is not a readable .npz archive ({said}). Write it with numpy.savez") from error


def _check_directory(archive: zipfile.ZipFile, path: Path) -> None:
    """The directory's own checks: without them a flipped bit in it would hide an array, the labels for instance."""
    with path.open("rb") as file:
        file.seek(-_END_BYTES, os.SEEK_END)
        end = file.read()
    infos = archive.infolist()
    if end[:4] != b"PK\5\6" or int.from_bytes(end[10:12], "little") != len(infos):
        raise FileError(f"{path}: its list of arrays is damaged. Copy the file again, or write it with numpy.savez")
    for info in infos:
        archive.open(info).close()  # which holds the directory against the member's own header


class _Archive:
    """An open .npz file as an `ArrayFile`."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path

    def keys(self) -> Iterable[str]:
        return [name.removesuffix(".npy") for name in self.archive.namelist()]

    def tensor(self, key: str) -> Tensor:
        name = f"{key}.npy"
        with self.archive.open(name if name in self.archive.namelist() else key) as member:
            try:
                array = np.lib.format.read_array(member, allow_pickle=False)
            except ValueError as error:
                if "pickle" not in str(error):
                    raise
                why = f"holds Python objects, which are never read. {NUMBERS}"
                raise FileError(f"{self.path}: '{key}' {why}") from error
            if member.read(1):  # the checksum is held against the bytes where the member ends
                raise FileError(f"{self.path}: '{key}' goes on after its array. Write the file with numpy.savez")
        return numeric(array, f"{self.path}: '{key}'")
