"""torch's zip format: every member stored plain, named once, laid out without gaps to hide in.

The directory is read by `zipfile`; each member's own header must agree with it, so that no other reader of the same
file could see something else.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from padconvert.errors import FileError, UnsafeError
from padconvert.load.storages import MappedFile, Region

_LOCAL = struct.Struct("<4s5H3I2H")
_END_BYTES = 22
# More than the directory of any network: some 65,000 members. Python's reader makes an object of each.
_MOST_DIRECTORY = 4 << 20
_LONGEST_COMMENT = 1 << 16
_END64_BYTES, _LOCATOR_BYTES = 56, 20


def members(file: MappedFile, writer: str = "torch.save") -> dict[str, Region]:
    """Each member's name inside the archive's one top folder, and where its bytes lie. `writer` is named as the way
    to a sound archive.

    Raises FileError for a damaged archive, UnsafeError for one that two readers would read differently.
    """
    try:
        with open_zip(file.path) as archive:
            infos, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise FileError(
            f"{file.path}: a zip archive that is damaged or cut off ({error}). Save or download it again."
        ) from error
    _check_names(file, infos, writer)
    if comment or file.read(Region(file.size - _END_BYTES, 4)) != b"PK\x05\x06":
        raise UnsafeError(f"{file.path}: bytes follow the zip archive's end. Save it again with {writer}.")
    regions = {info.filename: _region(file, info, writer) for info in infos}
    _check_layout(file, infos, regions, writer)
    return {_inner(name): region for name, region in regions.items()}


def open_zip(path: Path) -> zipfile.ZipFile:
    """The archive at `path`. Raises FileError where its directory is larger than that of any network, whatever
    `zipfile` raises where it is damaged."""
    with path.open("rb") as file:
        size = _directory_bytes(file)
    if size > _MOST_DIRECTORY:
        raise FileError(f"{path}: a zip archive whose directory takes {size} bytes, more than that of any network.")
    return zipfile.ZipFile(path)


def _directory_bytes(file: BinaryIO) -> int:
    """The size of the directory as the archive's end states it; 0 where there is no end."""
    at_end = file.seek(0, os.SEEK_END)
    before = _LONGEST_COMMENT + _END_BYTES + _LOCATOR_BYTES + _END64_BYTES
    file.seek(max(at_end - before, 0))
    tail = file.read()
    end = len(tail) - _END_BYTES if tail[-_END_BYTES:].startswith(b"PK\x05\x06") else tail.rfind(b"PK\x05\x06")
    if end < 0:
        return 0
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    end64 = end - _LOCATOR_BYTES - _END64_BYTES
    if end64 >= 0 and tail[end64 : end64 + 4] == b"PK\x06\x06":
        size = max(size if size != 0xFFFFFFFF else 0, int.from_bytes(tail[end64 + 40 : end64 + 48], "little"))
    return size


def _inner(name: str) -> str:
    return name.split("/", 1)[1]


def _check_names(file: MappedFile, infos: list[zipfile.ZipInfo], writer: str) -> None:
    names = [info.filename for info in infos]
    folded = {name.casefold() for name in names}
    if len(folded) != len(names):
        raise UnsafeError(f"{file.path}: two members of the archive have the same name. Save it again with {writer}.")
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
            raise UnsafeError(f"{file.path}: member {name!r} is not a plain path. Save it again with {writer}.")
    if len({name.split("/", 1)[0] for name in names}) > 1:
        raise UnsafeError(f"{file.path}: the archive has more than one top folder. Save it again with {writer}.")


def _region(file: MappedFile, info: zipfile.ZipInfo, writer: str) -> Region:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise UnsafeError(
            f"{file.path}: member {info.filename!r} is compressed or encrypted; torch stores its members plain. "
            f"Load and save the model again with {writer}."
        )
    header = file.read(Region(info.header_offset, _LOCAL.size))
    if len(header) < _LOCAL.size:
        raise FileError(f"{file.path}: member {info.filename!r} is cut off. Save or download it again.")
    magic, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
    start = info.header_offset + _LOCAL.size + name_bytes + extra_bytes
    name = file.read(Region(info.header_offset + _LOCAL.size, name_bytes))
    if magic != b"PK\x03\x04" or method != 0 or name != info.filename.encode():
        raise UnsafeError(f"{file.path}: member {info.filename!r} contradicts its own header. Save it again.")
    if start + info.file_size > file.size:
        raise FileError(f"{file.path}: member {info.filename!r} is cut off. Save or download it again.")
    return Region(start, info.file_size, info.CRC)


def _check_layout(file: MappedFile, infos: list[zipfile.ZipInfo], regions: dict[str, Region], writer: str) -> None:
    """The members follow one another from byte 0 without overlapping."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if (end == 0 and info.header_offset != 0) or info.header_offset < end:
            raise UnsafeError(
                f"{file.path}: the archive does not begin at its first byte, or its members overlap. "
                f"Save it again with {writer}."
            )
        end = regions[info.filename].start + regions[info.filename].size
