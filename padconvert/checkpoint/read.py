"""Reading a checkpoint: the header is checked against the manifest first, tensors come lazily out of a memory map."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from padconvert.checkpoint.bitmask import PlacementChecks
from padconvert.checkpoint.folder import INDEX, SINGLE, carries_manifest, examine_folder, merged
from padconvert.checkpoint.header import Header, header_of, open_regular, quote, read_metadata
from padconvert.checkpoint.layout import check_layout
from padconvert.checkpoint.manifest import KEY, Manifest, check_seal, manifest_from_json
from padconvert.checkpoint.probe_record import check_probe
from padconvert.checkpoint.tensor_bytes import crc32_of, tensor_of
from padconvert.errors import FileError
from padconvert.results import Check

_NO_ARTEFACT = "this is not an artefact of padconvert; verify takes what convert wrote"


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of any safetensors file, each read when it is asked for."""

    header: Header
    _private: mmap.mmap
    _shared: mmap.mmap

    def tensor(self, name: str) -> Tensor:
        """A tensor on the file's pages: nothing is read until it is used. It may be written to; the pages are private
        to this process, so the file stays as it is. Raises FileError for a dtype unknown to torch."""
        return tensor_of(self._private, self.header.tensors[name], self.header.data_start, name)

    def crc32(self, name: str) -> int:
        """The checksum of the tensor's bytes in the file, whatever was written to tensors handed out."""
        slot, start = self.header.tensors[name], self.header.data_start
        with memoryview(self._shared) as view:
            return crc32_of(view[start + slot.begin : start + slot.end])


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens any safetensors file, its header checked. Raises FileError."""
    with open_regular(path) as file:
        header = header_of(file, path)
        try:
            private = mmap.mmap(file.fileno(), header.file_size, access=mmap.ACCESS_COPY)
            shared = mmap.mmap(file.fileno(), header.file_size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be mapped into memory: {error}.") from None
    return TensorFile(header, private, shared)


class TensorFolder:
    """The tensors of several safetensors files as those of one; `header` is the one that this file would have."""

    def __init__(self, files: Sequence[TensorFile], header: Header) -> None:
        self.header = header
        self._file_of = {name: file for file in files for name in file.header.tensors}

    def tensor(self, name: str) -> Tensor:
        """As `TensorFile.tensor`."""
        return self._file_of[name].tensor(name)

    def crc32(self, name: str) -> int:
        """As `TensorFile.crc32`."""
        return self._file_of[name].crc32(name)


class Checkpoint:
    """An open artefact. Its header and manifest agree; a bitmask or index is checked before it is handed out."""

    def __init__(self, path: Path, file: TensorFile | TensorFolder, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.header = file.header
        self._file = file
        self._checks = PlacementChecks(manifest)

    def tensor(self, name: str, *, copy: bool = False) -> Tensor:
        """The tensor of that name or alias. Without `copy` it lies on the file's pages and needs no memory until it
        is used; writing to it never changes the file, but other tensors handed out under this name.
        Raises FileError for an unknown name and for a bitmask or index that is not what the manifest says."""
        stored = self.manifest.aliases.get(name, name)
        if stored not in self.header.tensors:
            raise FileError(f"{self.path}: there is no tensor {quote(name)}.")
        tensor = self._file.tensor(stored)
        try:
            self._checks.check(stored, tensor)
        except FileError as error:
            raise FileError(f"{self.path}: {error}") from None
        return tensor.clone() if copy else tensor

    def tensors(self, *, copy: bool = False) -> dict[str, Tensor]:
        """All tensors under all their names; the names of a tied tensor share one object."""
        stored = {name: self.tensor(name, copy=copy) for name in self.header.tensors}
        return stored | {alias: stored[kept] for alias, kept in self.manifest.aliases.items()}

    def verify_crc(self) -> list[Check]:
        """One check a tensor: the crc32 of its bytes against the manifest's."""
        return [self._check_crc(name, wanted) for name, wanted in self.manifest.crc32.items()]

    def _check_crc(self, name: str, wanted: int) -> Check:
        found = self._file.crc32(name)
        detail = "" if found == wanted else f"the bytes of {quote(name)} are damaged"
        return Check(f"crc32 {name}", found == wanted, f"{found:08x}", f"{wanted:08x}", detail)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens an artefact, a file or a folder. Only headers are read; every name, dtype, shape and count is checked.

    Raises FileError where it is no artefact, newer than this code, damaged, or contradicts itself.
    """
    place = Path(path)
    if place.is_dir():
        return _read_folder(place)
    _check_kind(path)
    file = open_tensors(path)
    return Checkpoint(place, file, _checked_manifest(place, file.header))


def _checked_manifest(path: Path, header: Header) -> Manifest:
    """The manifest in the header's metadata, held against its tensors."""
    text = header.metadata.get(KEY)
    if text is None:
        raise FileError(
            f"{path}: {_NO_ARTEFACT} ({'a folder' if path.is_dir() else 'a safetensors file'} without a manifest)."
        )
    try:
        manifest = manifest_from_json(text)
        check_seal(header.metadata, {name: (slot.dtype, slot.shape) for name, slot in header.tensors.items()})
        check_layout(manifest, header)
        if manifest.probe is not None:
            check_probe(manifest.probe)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return manifest


def _read_folder(folder: Path) -> Checkpoint:
    # with a file of tensors there, its reader says better what is wrong
    if not carries_manifest(folder) and not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise FileError(f"{folder}: {_NO_ARTEFACT} (a folder without a manifest).")
    plan = examine_folder(folder)
    files = {name: open_tensors(folder / name) for name in plan.files}
    try:
        header = merged({name: file.header for name, file in files.items()}, plan.weight_map, plan.metadata)
    except FileError as error:
        raise FileError(f"{folder}: {error}") from None
    manifest = _checked_manifest(folder, header)
    if plan.config is not None:  # the architecture's config is the rest of config.json
        architecture = {**manifest.architecture, "config": dict(plan.config)}
        manifest = dataclasses.replace(manifest, architecture=architecture)
    return Checkpoint(folder, TensorFolder(list(files.values()), header), manifest)


def _check_kind(path: str | os.PathLike[str]) -> None:
    """Raises FileError for a file that torch.save or torch.export.save wrote, where a header's length would be read
    out of its magic bytes."""
    with open_regular(path) as file:
        start = file.read(9)
    # a header's length may begin with the same bytes, but then the header follows
    if start[8:] != b"{" and (start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")):
        raise FileError(f"{path}: {_NO_ARTEFACT} (a zip archive or a pickle, as torch.save writes).")


def is_artefact(path: str | os.PathLike[str]) -> bool:
    """Whether the file's header, or the folder, carries a manifest. A cut-short artefact still is one; a file of
    another kind, or none at all, is not."""
    if Path(path).is_dir():
        return carries_manifest(Path(path))
    try:
        return KEY in read_metadata(path)
    except FileError:
        return False
