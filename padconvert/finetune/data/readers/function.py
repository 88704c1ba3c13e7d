"""`pkg.mod:function`: the user's own code gives the examples."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from padconvert.errors import FileError
from padconvert.finetune.data.arrays import from_tensors, numeric
from padconvert.finetune.data.examples import Batch, Examples, TensorExamples, settled_labels
from padconvert.finetune.data.spec import DataPolicy

TAKES = "pkg.mod:function (your own code)"

_GIVES = "It has to return (inputs, labels) as tensors or arrays, a torch Dataset of (input, label), or Examples"


def is_reference(ref: str) -> bool:
    """Whether `ref` has the form `pkg.mod:function`."""
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", ref) is not None


def matches(ref: str) -> bool:
    return is_reference(ref) and not Path(ref).exists()


def read(refs: Sequence[str], spec: DataPolicy) -> Examples:
    """What the function returns, as examples. Raises `FileError` naming the function, and the line that failed."""
    if len(refs) > 1:
        raise FileError(f"{', '.join(refs)}: only one function can give the data. Join them in a function of your own")
    ref = refs[0]
    function = _function(ref)
    try:
        given = function()
    except (Exception, SystemExit) as error:  # a script's sys.exit() must not end this run as if all were done
        raise FileError(f"{ref}: failed at {_place(error)}: {_said(error)}. Repair it") from error
    return _as_examples(given, ref, spec)


def _function(ref: str) -> Callable[[], object]:
    module_name, _, name = ref.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # joins only now that the user asked for code
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise FileError(
            f"{ref}: importing '{module_name}' failed: {_said(error)}. "
            "The module has to lie in the current directory or be installed"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FileError(f"{ref}: '{module_name}' has no function '{name}'. {_GIVES}")
    return cast(Callable[[], object], function)


def _as_examples(given: object, ref: str, spec: DataPolicy) -> Examples:
    match given:
        case tuple() | list() if len(given) == 2:
            inputs, labels = given
            return from_tensors(_inputs(inputs, ref), None if labels is None else _tensor(labels, ref), ref, spec)
        case TensorExamples():
            return from_tensors(given.inputs, given.labels, ref, spec)
        case Dataset():
            return DatasetExamples(given, ref)
        case _ if hasattr(given, "batch") and hasattr(given, "num_classes") and hasattr(given, "__len__"):
            return _non_empty(cast(Examples, given), ref)
        case _:
            raise FileError(f"{ref}: returned {type(given).__name__}. {_GIVES}")


class DatasetExamples:
    """A torch Dataset of (input, label), or of inputs alone, read one batch at a time."""

    num_classes = None

    def __init__(self, dataset: Dataset[Any], ref: str) -> None:
        if not hasattr(dataset, "__len__"):
            raise FileError(
                f"{ref}: the dataset has no length. Iterable datasets cannot be read at any place. {_GIVES}"
            )
        self.dataset, self.ref = dataset, ref
        _non_empty(self, ref)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> Batch:
        try:
            items = [self.dataset[index] for index in indices.tolist()]
        except (Exception, SystemExit) as error:
            raise FileError(
                f"{self.ref}: reading an example failed at {_place(error)}: {_said(error)}. Repair it"
            ) from error
        pairs = [item if isinstance(item, tuple | list) else (item, None) for item in items]
        if any(len(pair) != 2 for pair in pairs):
            raise FileError(f"{self.ref}: an example is not a pair. {_GIVES}")
        inputs = self._stacked([pair[0] for pair in pairs])
        if any(pair[1] is None for pair in pairs):
            return Batch(inputs, None)
        return Batch(inputs, settled_labels(self._stacked([pair[1] for pair in pairs])))

    def _stacked(self, values: list[object]) -> Tensor:
        tensors = [_tensor(value, self.ref) for value in values]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise FileError(f"{self.ref}: examples differ in shape: {shapes[0]}, {shapes[1]}. Make them equal")
        return torch.stack(tensors)


def _non_empty(examples: Examples, ref: str) -> Examples:
    if len(examples) == 0:
        raise FileError(f"{ref}: gives no examples. {_GIVES}")
    return examples


def _inputs(given: object, ref: str) -> Tensor | dict[str, Tensor]:
    if isinstance(given, Mapping):
        return {str(name): _tensor(value, ref) for name, value in given.items()}
    return _tensor(given, ref)


def _tensor(given: object, ref: str) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise FileError(f"{ref}: gives a {type(given).__name__} that is no array ({error}). {_GIVES}") from error
    if array.dtype == object:
        raise FileError(f"{ref}: gives {type(given).__name__} where a tensor or an array was expected. {_GIVES}")
    return numeric(array, ref)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _place(error: BaseException) -> str:
    """file:line of the innermost frame outside this file that `error` came from."""
    place, frame = "its call", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place
