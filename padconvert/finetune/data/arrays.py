"""From named arrays, as array files hold them, to examples: keys, layout, labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.examples import TensorExamples, checked, tensors_of
from padconvert.finetune.data.spec import NO_LABELS, DataPolicy, input_names

#: the next step where something else than numbers was found
NUMBERS = "Save plain arrays of numbers"


class ArrayFile(Protocol):
    """An open array file: the names in it, and one array at a time."""

    def keys(self) -> Iterable[str]: ...

    def tensor(self, key: str) -> Tensor: ...


def from_array_file(file: ArrayFile, path: Path, spec: DataPolicy) -> TensorExamples:
    """The inputs and labels that `spec` names in `file`; several input names give keyword inputs.

    A file that holds nothing but the inputs has no labels. Raises `FileError`, listing the names in the file.
    """
    keys, wanted, label_key = sorted(file.keys()), input_names(spec), spec.label_key
    unlabelled = label_key == NO_LABELS and NO_LABELS not in keys
    for key in wanted:
        if key not in keys:
            raise FileError(f"{path}: holds no array '{key}'{_listed(keys)}. Name the inputs with data.input_key")
    others = sorted(set(keys) - set(wanted))
    if not unlabelled and label_key not in keys and others:
        raise FileError(
            f"{path}: holds no array '{label_key}'{_listed(keys)}. "
            f"Name the labels with data.label_key, or set it to {NO_LABELS} when there are none"
        )
    labels = file.tensor(label_key) if label_key in keys else None
    inputs = {key: file.tensor(key) for key in wanted}
    return from_tensors(next(iter(inputs.values())) if len(inputs) == 1 else inputs, labels, str(path), spec)


def from_tensors(
    inputs: Tensor | dict[str, Tensor], labels: Tensor | None, origin: str, spec: DataPolicy
) -> TensorExamples:
    """Checked examples with the channels first. Raises `FileError` naming `origin`."""
    for name, tensor in {**tensors_of(inputs), **({} if labels is None else {"labels": labels})}.items():
        _require_numbers(tensor, f"{origin}: {name or 'inputs'}")
    if spec.layout == "nhwc":
        if not isinstance(inputs, Tensor) or inputs.ndim not in (3, 4):
            shape = {name or "inputs": tuple(tensor.shape) for name, tensor in tensors_of(inputs).items()}
            raise FileError(f"{origin}: data.layout nhwc needs one array of images [N, H, W, C], not {shape}")
        # views: the bytes stay where they are, each batch is laid out anew
        inputs = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.permute(0, 3, 1, 2)
    return checked(TensorExamples(inputs, labels), origin)


def concatenated(parts: Sequence[TensorExamples], paths: Sequence[Path]) -> TensorExamples:
    """All examples of `parts`, in order. Raises `FileError` where a file does not fit the first one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part, path in zip(parts[1:], paths[1:], strict=True):
        if _form(part) != _form(first):
            raise FileError(
                f"{path}: does not fit {paths[0]}: {_form(part)} there, {_form(first)} here. "
                "Files that are read together need equal names, shapes and dtypes"
            )
    labels = None if first.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    if isinstance(first.inputs, Tensor):
        return TensorExamples(torch.cat([part.inputs for part in parts if isinstance(part.inputs, Tensor)]), labels)
    joined = {name: torch.cat([tensors_of(part.inputs)[name] for part in parts]) for name in first.inputs}
    return TensorExamples(joined, labels)


def numeric(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """The array as a tensor. Raises `FileError` for anything but real numbers."""
    if array.dtype.kind not in "biuf":
        raise FileError(f"{where} has dtype {array.dtype}. {NUMBERS}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch's wider unsigned integers cannot be indexed
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


def _require_numbers(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in _DTYPES:
        raise FileError(f"{where}: has dtype {str(tensor.dtype).removeprefix('torch.')}. {NUMBERS}")
    if tensor.ndim == 0:
        raise FileError(f"{where}: is a single number, not an array of examples. Stack the examples along axis 0")


def _form(examples: TensorExamples) -> str:
    """Names, shapes without the examples' axis, and dtypes: what has to agree between files."""
    named = {name or "inputs": tensor for name, tensor in tensors_of(examples.inputs).items()}
    if examples.labels is not None:
        named["labels"] = examples.labels
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape[1:])}" for name, tensor in named.items()
    )


def _listed(keys: Sequence[str]) -> str:
    return f" (it holds {', '.join(keys)})" if keys else " (it is empty)"
