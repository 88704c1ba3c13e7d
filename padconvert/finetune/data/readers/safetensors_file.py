"""safetensors files: tensors `x` and `y`, or the names that the policy gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.arrays import concatenated, from_array_file
from padconvert.finetune.data.examples import Examples, TensorExamples
from padconvert.finetune.data.spec import DataPolicy

TAKES = ".safetensors (tensors)"


def matches(ref: str) -> bool:
    return Path(ref).suffix.lower() == ".safetensors"


def read(refs: Sequence[str], spec: DataPolicy) -> Examples:
    """The tensors of all files, one after the other. Raises `FileError`."""
    paths = [Path(ref) for ref in refs]
    return concatenated([_read_one(path, spec) for path in paths], paths)


def _read_one(path: Path, spec: DataPolicy) -> TensorExamples:
    try:
        with safe_open(path, framework="pt") as file:
            return from_array_file(_Tensors(file), path, spec)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: is not a readable safetensors file ({error}). Write it with safetensors") from error


class _Tensors:
    """An open safetensors file as an `ArrayFile`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def keys(self) -> Iterable[str]:
        return list(self.file.keys())

    def tensor(self, key: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(key)
        return tensor
