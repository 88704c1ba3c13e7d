"""A `.safetensors` file: the header is read and checked, the tensors are mapped one by one when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from padconvert.checkpoint.header import Slot, read_header
from padconvert.load.state_dict import tensor_names
from padconvert.load.storages import MappedFile, Region, torch_dtype


class HeaderTensors(Mapping[str, Tensor]):
    """The tensors of a file by their names in the network. `slots` tells dtypes and shapes without mapping any."""

    def __init__(self, path: Path, slots: Mapping[str, Slot], data_start: int) -> None:
        self.path = path
        self.slots = slots
        self.data_start = data_start

    def __getitem__(self, name: str) -> Tensor:
        slot = self.slots[name]
        dtype = torch_dtype(slot.dtype)
        storage = MappedFile(self.path).storage(Region(self.data_start + slot.begin, slot.nbytes))
        return torch.empty(0, dtype=dtype).set_(storage).reshape(slot.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def load_safetensors(path: Path) -> tuple[HeaderTensors, tuple[str, ...]]:
    """The file's tensors by their names in the network, made when asked for, and notes. Raises FileError."""
    header = read_header(path)
    names, notes = tensor_names(list(header.tensors), str(path))
    slots = {name: header.tensors[stored] for name, stored in names.items()}
    return HeaderTensors(path, slots, header.data_start), notes
