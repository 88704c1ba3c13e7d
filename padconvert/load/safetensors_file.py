"""A `.safetensors` file: the header is read and checked, the tensors are mapped and not touched."""

from __future__ import annotations

from pathlib import Path

from padconvert.checkpoint.read import open_tensors
from padconvert.load.source import LazyTensors
from padconvert.load.state_dict import tensor_names


def load_safetensors(path: Path) -> tuple[LazyTensors, tuple[str, ...]]:
    """The file's tensors by their names in the network, made when asked for, and notes. Raises FileError."""
    file = open_tensors(path)
    names, notes = tensor_names(list(file.header.tensors), str(path))
    return LazyTensors(names, file.tensor), notes
