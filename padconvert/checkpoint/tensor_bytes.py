"""A tensor ↔ its bytes in a file: dense, row-major, little endian."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from padconvert.checkpoint.header import Slot, quote
from padconvert.errors import FileError


def spec_of(name: str, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) as a header wants them. Raises FileError for a tensor without plain values."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        what = "has no values (meta device)" if tensor.is_meta else "is sparse or quantised"
        raise FileError(f"tensor {quote(name)} {what}; only plain tensors can be stored.")
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def view_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes; a copy only where it is not dense in memory already."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not plain.numel():
        return memoryview(b"")
    return plain.reshape(-1).view(torch.uint8).numpy().data


def crc32_of(data: memoryview, before: int = 0) -> int:
    """The checksum of `data`, or of all that has the checksum `before` and then `data`."""
    return zlib.crc32(data, before)


def tensor_of(buffer: Any, slot: Slot, start: int, name: str) -> Tensor:
    """The tensor at `slot` in a buffer whose tensors begin at byte `start`; it shares the buffer's memory, unless it
    lies there unaligned. Raises FileError for a dtype that torch does not have."""
    dtype = getattr(torch, slot.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise FileError(f"tensor {quote(name)} is {slot.dtype}, which this torch cannot hold.")
    if not slot.nbytes:
        return torch.empty(slot.shape, dtype=dtype)
    offset = start + slot.begin
    if offset % dtype.itemsize:
        buffer, offset = bytearray(memoryview(buffer)[offset : start + slot.end]), 0
    count = slot.nbytes // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(slot.shape)


def place_of(tensor: Tensor) -> tuple[object, ...] | None:
    """Where a tensor lies and how it is seen there: equal for one tensor under two names. None without entries."""
    if not tensor.numel():
        return None
    seen_as = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.data_ptr(), tensor.device, *seen_as
