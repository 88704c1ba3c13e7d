"""The one reader of pickled files, zip and legacy: from bytes to a checked tree and the storages beside it.

Auditing and loading use the same tree of the same bytes; `load.build` turns it into objects under the rules there.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path

from padconvert.errors import FileError, UnsafeError
from padconvert.load.archive import members
from padconvert.load.machine import Readable, parse
from padconvert.load.nodes import NameNode, SeriesNode, StorageNode, TableNode, Tree, Value
from padconvert.load.reductions import DTYPE_BYTES
from padconvert.load.storages import MappedFile, Region, Storages

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ZIP_START = b"PK\x03\x04"
_PICKLES = 16
_COUNT = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Pickled:
    """A pickled file, read but not built: its tree, its storages, and which of the two formats it has."""

    tree: Tree
    storages: Storages
    format: str


def read(path: Path, names: list[NameNode] | None = None) -> Pickled:
    """The tree and the storages of a file that torch.save wrote. `names` gets every name that was met, also where the
    file turns out to be none.

    Raises FileError where the file is damaged or no such file, UnsafeError where it is made to be read in two ways.
    """
    file = MappedFile(path)
    if file.map()[:4] == _ZIP_START:
        return _read_zip(file, names)
    return _read_legacy(file, names)


def mentions_code(path: Path) -> bool:
    """Whether a file of no known kind is a pickle, of any protocol, that names a class or function."""
    names: list[NameNode] = []
    try:
        parse(MappedFile(path).map(), str(path), names)
    except FileError:  # text may well begin like one
        return False
    except UnsafeError:
        pass
    return any(all(part.isidentifier() for part in name.full.split(".")) for name in names)


def _read_zip(file: MappedFile, names: list[NameNode] | None) -> Pickled:
    regions = members(file)
    if "data.pkl" not in regions:
        raise FileError(f"{file.path}: a zip archive, but not one that torch.save wrote (it has no data.pkl).")
    if "byteorder" in regions and file.read(regions["byteorder"]) != b"little":
        raise FileError(f"{file.path}: it was saved on a big-endian machine. Save it again on a little-endian one.")
    file.check(regions["data.pkl"], "the record 'data.pkl'")
    tree = parse(file.read(regions["data.pkl"]), str(file.path), names)
    named = {name.removeprefix("data/"): region for name, region in regions.items() if name.startswith("data/")}
    storages = Storages(file, named)
    storages.check(tree.storages)
    return Pickled(tree, storages, "zip")


def _read_legacy(file: MappedFile, names: list[NameNode] | None) -> Pickled:
    """Magic number, version, system facts, the object, the storages' keys; then each storage with its count."""
    source, where = file.map(), str(file.path)
    source.seek(0)
    magic = parse(source, where, names)
    if magic.root != LEGACY_MAGIC:
        _read_on(source, where, names)
        raise FileError(f"{where}: a pickle, but not one that torch.save wrote. Save the model with torch.save.")
    version = parse(source, where, names)
    if version.root != _LEGACY_VERSION:
        raise FileError(f"{where}: an unknown version of torch's old format. Save it again with a newer torch.")
    facts = parse(source, where, names)
    if isinstance(facts.root, TableNode) and dict(_text_pairs(facts.root)).get("little_endian") is False:
        raise FileError(f"{where}: it was saved on a big-endian machine. Save it again on a little-endian one.")
    tree = parse(source, where, names)
    keys = parse(source, where, names)
    if not isinstance(keys.root, SeriesNode):
        raise FileError(f"{where}: the list of storages is damaged. Save or download it again.")
    regions = _legacy_regions(file, source.tell(), [str(key) for key in keys.root.items], tree.storages)
    storages = Storages(file, regions)
    storages.check(tree.storages)
    # no name may hide in the small pickles around the model
    tree.names += [name for other in (magic, version, facts, keys) for name in other.names]
    return Pickled(tree, storages, "legacy")


def _read_on(source: Readable, where: str, names: list[NameNode] | None) -> None:
    """Names may stand in the pickles behind the first, as far as there are any."""
    with contextlib.suppress(FileError):
        for _ in range(_PICKLES):
            parse(source, where, names)


def _text_pairs(table: TableNode) -> list[tuple[str, Value]]:
    return [(key, value) for key, value in table.pairs if isinstance(key, str)]


def _legacy_regions(file: MappedFile, at: int, keys: list[str], nodes: dict[str, StorageNode]) -> dict[str, Region]:
    regions: dict[str, Region] = {}
    for key in keys:
        node = nodes.get(key)
        head = file.read(Region(at, _COUNT.size))
        if node is None or key in regions or len(head) < _COUNT.size:
            raise FileError(f"{file.path}: storage {key!r} is damaged or cut off. Save or download it again.")
        (count,) = _COUNT.unpack(head)
        size = count * (DTYPE_BYTES[node.dtype] if node.dtype else 1)
        at += _COUNT.size
        if count < 0 or at + size > file.size:
            raise FileError(f"{file.path}: storage {key!r} is cut off. Save or download it again.")
        regions[key] = Region(at, size)
        at += size
    if at != file.size:
        raise UnsafeError(f"{file.path}: {file.size - at} bytes follow the model's end. Save it again with torch.save.")
    return regions
