"""The zip archive of a `.pt2` file: which members it may have, and its tensors. Nothing in it is unpickled."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from padconvert.errors import FileError, UnsafeError
from padconvert.load.archive import members, open_zip
from padconvert.load.exported_grammar import EXPORT_AGAIN, check_path, shown
from padconvert.load.exported_program import parse
from padconvert.load.exported_torch import plain_int, tensor_spec
from padconvert.load.machine import parse as parse_pickle
from padconvert.load.names import check_names
from padconvert.load.nodes import View
from padconvert.load.storages import MappedFile, Region, Storages

_PROGRAM = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_CONFIGS = {_WEIGHTS: "model_weights_config.json", _CONSTANTS: "model_constants_config.json"}
_PAYLOADS = {_WEIGHTS: re.compile(r"weight_\d+\Z", re.ASCII), _CONSTANTS: re.compile(r"tensor_\d+\Z", re.ASCII)}
_SAMPLES = "data/sample_inputs/model.pt"
_MAX_NOTE = 64
_NOTES = frozenset(
    {"archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id"}
)
# What the user put beside the program (`extra_files=`). It stays unread here, but somebody may read it elsewhere, so
# only text passes.
_EXTRA = "extra/"
_EXTRA_NAME = re.compile(
    r"extra/([\w \-]+/)*[\w \-]+(\.(txt|json|jsonl|md|yaml|yml|csv|tsv|toml|cfg|ini|xml))?\Z", re.ASCII
)
_MAX_EXTRA = 16 << 20
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "OBJ", "NEWOBJ", "EXT1", "EXT2", "EXT4"})
EXPORT = "torch.export.save(torch.export.export(model.eval(), inputs, dynamic_shapes=...), 'model.pt2')"
_OLD = "serialized_exported_program.json"
# Why a member is refused, by how its name starts; the first that fits.
_REFUSED = (
    ("data/aotinductor/", "a compiled library, which would be loaded and run"),
    ("data/constants/custom_obj_", "a pickled object"),
    ("data/constants/opaque_obj_", "a pickled object"),
    ("data/weights/", "weights in a form that would be unpickled"),
    ("data/constants/", "constants in a form that would be unpickled"),
    ("data/sample_inputs/", "a pickle"),
    ("models/", "a second program; save one program a file"),
    (_EXTRA, "more than text; export without such extra_files"),
)


@dataclass(frozen=True, slots=True)
class Archive:
    """A checked archive: its members' names, torch's JSON of the program, and its tensors by their names."""

    names: tuple[str, ...]
    program: Any
    tensors: Mapping[str, Tensor]


def read_archive(path: Path) -> Archive:
    """The archive at `path`, as torch 2.11 and later write it. Weights are mapped, not read.

    Raises UnsafeError for a member that is not on the list or holds code, FileError for a damaged or older archive.
    """
    file = MappedFile(path)
    _refuse_old(path)
    regions = members(file, "torch.export.save")
    for name in regions:
        if why := why_refused(name):
            raise UnsafeError(f"{path}: member {shown(name)} is {why}. {EXPORT_AGAIN}")
    for name, wanted in (("archive_format", b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
        if name not in regions or file.read(_first(regions[name])) != wanted:
            raise FileError(f"{path}: its member {name} is not {wanted.decode()!r}. Export the model again: {EXPORT}.")
    for name in regions:
        if (name in _NOTES and not _is_note(file, regions[name])) or (
            name.startswith(_EXTRA) and not _is_text(file, regions[name])
        ):
            raise UnsafeError(f"{path}: member {shown(name)} is more than text. {EXPORT_AGAIN}")
    if _SAMPLES in regions:
        _check_samples(file.read(regions[_SAMPLES]), str(path))
    if _PROGRAM not in regions:
        raise FileError(f"{path}: an archive without {_PROGRAM}, the program. Export the model again: {EXPORT}.")
    program = parse(file.read(regions[_PROGRAM]), f"{path}: {_PROGRAM}")
    weights, constants = (_tensors(file, regions, folder) for folder in (_WEIGHTS, _CONSTANTS))
    if both := weights.keys() & constants.keys():
        raise FileError(f"{path}: {shown(min(both))} is both a weight and a constant. {EXPORT_AGAIN}")
    return Archive(tuple(sorted(regions)), program, {**weights, **constants})


def member_names(path: Path) -> list[str]:
    """All names in the archive's directory, as they stand there; for an audit. Raises FileError."""
    try:
        with open_zip(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FileError(f"{path}: a zip archive that is damaged or cut off ({error}). Download it again.") from error


def _refuse_old(path: Path) -> None:
    if any(name.rpartition("/")[2] == _OLD for name in member_names(path)):
        raise FileError(
            f"{path}: an exported program in the layout of torch 2.7 and before, which is read by unpickling. "
            f"Export the model again with torch 2.11 or newer: {EXPORT}."
        )


def _first(region: Region) -> Region:
    """A short note of torch's, never more than a few bytes of it."""
    return Region(region.start, min(region.size, _MAX_NOTE))


def why_refused(name: str) -> str:
    """Why a member of this name, without the archive's top folder, is refused; "" where it is part of a program."""
    if name in _NOTES or name in (_PROGRAM, _SAMPLES) or (name.startswith(_EXTRA) and _EXTRA_NAME.match(name)):
        return ""
    for folder, payload in _PAYLOADS.items():
        inner = name.removeprefix(folder)
        if name.startswith(folder) and (inner == _CONFIGS[folder] or payload.match(inner)):
            return ""
    return next((why for start, why in _REFUSED if name.startswith(start)), "not part of an exported program")


def _is_note(file: MappedFile, region: Region) -> bool:
    """Whether the member is a few characters, as torch writes them."""
    return region.size <= _MAX_NOTE and file.read(region).isascii() and b"\0" not in file.read(region)


def _is_text(file: MappedFile, region: Region) -> bool:
    """Whether the member is text that neither a shell nor an unpickler would run."""
    if region.size > _MAX_EXTRA:
        return False
    data = file.read(region)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    plain = all(letter.isprintable() or letter in "\r\n\t" for letter in text)
    return plain and not text.startswith("#!") and not _is_pickle(data)


def _is_pickle(data: bytes) -> bool:
    """Whether these bytes are a whole pickle that calls something; the oldest kind is text."""
    try:
        return any(opcode.name in _CALLS for opcode, _, _ in list(pickletools.genops(data)))
    except Exception:  # pickletools raises many kinds for what is no pickle
        return False


def _check_samples(data: bytes, where: str) -> None:
    """The sample inputs are never loaded, but a file that would run code elsewhere is not passed on either."""
    if not data:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].compress_type != zipfile.ZIP_STORED:
                raise UnsafeError(f"{where}: its sample inputs are a pickle that two readers read differently.")
            pickled = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        raise UnsafeError(f"{where}: its sample inputs are a pickle of an unknown layout. {EXPORT_AGAIN}") from None
    check_names(parse_pickle(pickled, f"{where}: its sample inputs").names, (), f"{where}: its sample inputs")


def _tensors(file: MappedFile, regions: Mapping[str, Region], folder: str) -> dict[str, Tensor]:
    """The tensors of one folder by their names; names with the same view share one object."""
    config = folder + _CONFIGS[folder]
    if config not in regions:
        raise FileError(f"{file.path}: an archive without {config}. Export the model again: {EXPORT}.")
    listed = parse(file.read(regions[config]), f"{file.path}: {config}")
    entries = listed.get("config") if isinstance(listed, dict) else None
    if not isinstance(entries, dict):
        raise FileError(f"{file.path}: {config} lists no tensors. {EXPORT_AGAIN}")
    storages = Storages(file, dict(regions))
    storages.intact = True
    made: dict[View, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        view = _view(entry, folder, regions, f"{file.path}: {check_path(name, 'the tensor', str(file.path))}")
        if view not in made:
            made[view] = storages.tensor(view)
        found[name] = made[view]
    read = {view.storage for view in made}
    if unread := [name for name in regions if name.startswith(folder) and name != config and name not in read]:
        raise UnsafeError(f"{file.path}: member {shown(min(unread))} belongs to no tensor. {EXPORT_AGAIN}")
    return found


def _view(entry: object, folder: str, regions: Mapping[str, Region], where: str) -> View:
    """Where a tensor's values lie. Raises UnsafeError where it is pickled."""
    if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
        raise UnsafeError(f"{where}: is stored as a pickle, which would be run. Export a model of plain tensors.")
    meta, member = entry.get("tensor_meta"), entry.get("path_name")
    if not isinstance(member, str) or not _PAYLOADS[folder].match(member) or folder + member not in regions:
        raise FileError(f"{where}: its values are not in the archive ({shown(member)}). {EXPORT_AGAIN}")
    dtype, sizes = tensor_spec(meta, where)
    assert isinstance(meta, dict)
    strides, offset = meta.get("strides"), meta.get("storage_offset")
    if not isinstance(strides, list):
        raise FileError(f"{where}: has no strides. {EXPORT_AGAIN}")
    size, stride = (tuple(plain_int(each, where) for each in part) for part in (sizes, strides))
    return View(folder + member, dtype, plain_int(offset, where), size, stride)
