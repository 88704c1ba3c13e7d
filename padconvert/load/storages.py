"""Tensors straight from a file's bytes: mapped, not read, and only where they fit their storage."""

from __future__ import annotations

import math
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.load.nodes import StorageNode, View
from padconvert.load.reductions import DTYPE_BYTES

# An expanded view (stride 0) may show more entries than are stored, up to this many.
_MAX_EXPANDED = 1 << 24
# Different views of the same bytes become tensors of their own, in memory and in the artefact: the most of that, and
# how often all that is stored may be shown.
_SPARE_BYTES = 1 << 28
_MOST_SHOWN = 4
_MAX_COUNT = 1 << 48
_ALIGNMENT = 8  # of the widest dtype's parts
_SMALL = 1 << 16


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes in a file, and its CRC32 where the file records one; 0 where it does not (torch can leave it out,
    and its old format has none)."""

    start: int
    size: int
    crc: int = 0


class MappedFile:
    """A file of any size, mapped for reading. Storages are mapped one by one and copy-on-write: what is written into
    their tensors never reaches the disk, and a file larger than the memory can still be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error

    def map(self) -> mmap.mmap:
        """The mapped bytes. Raises FileError for an empty file."""
        if self.bytes is None:
            raise FileError(f"{self.path}: the file is empty. Save or download it again.")
        return self.bytes

    def read(self, region: Region) -> bytes:
        return self.map()[region.start : region.start + region.size]

    def check(self, region: Region, what: str) -> None:
        """Raises FileError, naming `what`, where the region's bytes are not those that were written. Nothing is
        copied."""
        with memoryview(self.map()) as whole, whole[region.start : region.start + region.size] as part:
            found = zlib.crc32(part)
        if region.crc not in (0, found):
            raise FileError(f"{self.path}: {what} is damaged: its checksum is not the recorded one. Download it again.")

    def storage(self, region: Region) -> torch.UntypedStorage:
        """The region as a storage of its own; copied where it is small, or its place in the file is not aligned."""
        if region.size == 0:
            return torch.UntypedStorage(0)
        if region.size < _SMALL or region.start % _ALIGNMENT:
            return torch.frombuffer(bytearray(self.read(region)), dtype=torch.uint8).untyped_storage()
        before = region.start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                pages = mmap.mmap(
                    file.fileno(), before + region.size, offset=region.start - before, access=mmap.ACCESS_COPY
                )
        except (OSError, ValueError) as error:
            raise FileError(f"{self.path}: {region.size} bytes cannot be mapped into memory ({error}).") from error
        return torch.frombuffer(pages, dtype=torch.uint8, count=region.size, offset=before).untyped_storage()


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name. Raises FileError where this torch has none."""
    dtype = getattr(torch, name, None)
    if name not in DTYPE_BYTES or not isinstance(dtype, torch.dtype):
        raise FileError(f"dtype {name} is not supported.")
    return dtype


class Storages:
    """The storages of one pickle, and the tensors that are views of them. Shared storages stay shared. With `intact`
    each is held against its recorded checksum before its first tensor is made."""

    def __init__(self, file: MappedFile, regions: dict[str, Region]) -> None:
        self.file = file
        self.regions = regions
        self.made: dict[str, torch.UntypedStorage] = {}
        self.shown: set[View] = set()
        self.shown_bytes = 0
        self.intact = False

    def check(self, storages: dict[str, StorageNode]) -> None:
        """Raises FileError where a storage is not in the file, or is not as large as the pickle says."""
        for key, node in storages.items():
            region = self.regions.get(key)
            width = DTYPE_BYTES[node.dtype] if node.dtype else 1
            if region is None:
                raise FileError(f"{self.file.path}: storage {key!r} is missing from the file. Download it again.")
            if region.size != node.entries * width:
                raise FileError(
                    f"{self.file.path}: storage {key!r} has {region.size} bytes where its pickle says "
                    f"{node.entries * width}. The file is damaged; save or download it again."
                )

    def tensor(self, view: View) -> Tensor:
        """The tensor of this view. Raises FileError where it does not fit its storage."""
        storage = self.made.get(view.storage)
        if storage is None:
            if self.intact:
                self.file.check(self.regions[view.storage], f"the record {view.storage!r}")
            storage = self.made[view.storage] = self.file.storage(self.regions[view.storage])
            if view.dtype == "bool":
                self._check_bool(view.storage, storage)
        self.check_view(view)
        return torch.empty(0, dtype=torch_dtype(view.dtype)).set_(storage, view.offset, view.size, view.stride)

    def check_view(self, view: View) -> None:
        """Raises FileError where a view does not fit its storage, or the views until now show far more than is
        stored. Equal ones count once."""
        check_view(view, self.regions[view.storage].size, str(self.file.path))
        if view not in self.shown:
            self.shown.add(view)
            self.shown_bytes += math.prod(view.size) * DTYPE_BYTES[view.dtype]
        if self.shown_bytes > _SPARE_BYTES + _MOST_SHOWN * self.file.size:
            raise FileError(
                f"{self.file.path}: its tensors show the same bytes over and over, {self.shown_bytes} in all of a file "
                f"of {self.file.size}. Save the model again with tensor.clone() for what is expanded or sliced."
            )

    def _check_bool(self, key: str, storage: torch.UntypedStorage) -> None:
        """A truth value is one of two bytes; what torch does with others is undefined."""
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        if raw.numel() and int(raw.max()) > 1:
            raise FileError(f"{self.file.path}: storage {key!r} holds bytes that are no truth values. It is damaged.")


def check_view(view: View, storage_bytes: int, where: str) -> None:
    """Raises FileError unless every entry of the view lies inside a storage of so many bytes."""
    entries = storage_bytes // DTYPE_BYTES[view.dtype]
    numel = math.prod(view.size)
    counts = (view.offset, *view.size, *view.stride)
    plain = len(view.size) == len(view.stride) and min(counts) >= 0 and max(counts) <= _MAX_COUNT
    last = sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=False)) if plain else 0
    fits = view.offset + last + 1 <= entries if numel else view.offset <= entries
    if not plain or not fits or numel > max(entries, _MAX_EXPANDED):
        raise FileError(
            f"{where}: a tensor of size {view.size}, stride {view.stride} and offset {view.offset} does not fit its "
            f"storage {view.storage!r} of {entries} entries. The file is damaged; save or download it again."
        )
