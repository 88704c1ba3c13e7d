"""The header of a safetensors file, written and read without torch and without touching the tensors.

    8 bytes little endian: N  |  N bytes: JSON, padded with spaces to a multiple of 8  |  the tensors' bytes

The library writes several metadata keys in random order, so the writer here is our own; the reader is our own so
that every fault is one clear line and `inspect` works on files of any size. `docs/format.md` has the rules.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO, NoReturn

from padconvert.errors import FileError

#: the most bytes of header that a reader accepts, as in the reference implementation
MAX_HEADER = 100_000_000
MAX_RANK = 64
_MAX_COUNT = 2**63 - 1

#: code in the file → name (torch's, where torch has the dtype) and bits; in ascending order of the reference
#: implementation, which stores tensors by descending dtype, then name: so every tensor lies aligned
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_CODES = {name: code for code, (name, _) in _DTYPES.items()}
_RANKS = {name: rank for rank, (name, _) in enumerate(_DTYPES.values())}

_short = Repr()
_short.maxstring = 100


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies: `dtype` is torch's name ("float32"), `begin` and `end` count from `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. `tensors` are in the order of their bytes; `data_start` is the header's size."""

    metadata: dict[str, str]
    tensors: dict[str, Slot]
    data_start: int

    @property
    def file_size(self) -> int:
        return self.data_start + max((slot.end for slot in self.tensors.values()), default=0)


def quote(text: str) -> str:
    """A name out of a file as it may stand in a message: on one line, printable, not too long."""
    return _short.repr(text)


def encode_header(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """The header's bytes for tensors of these (dtype, shape), and the same as a `Header`.

    The same arguments give the same bytes, in whatever order they come. Raises FileError for a dtype or a name that
    the format cannot hold, and for a header past its largest size.
    """
    slots = _lay_out(specs)
    document: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, slot in slots.items():
        offsets = [slot.begin, slot.end]
        document[name] = {"dtype": _CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": offsets}
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"a tensor name or the metadata is not valid Unicode: {quote(error.object)}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FileError(f"the file's header would be {len(text)} bytes; a safetensors header ends at {MAX_HEADER}.")
    return len(text).to_bytes(8, "little") + text, Header(dict(metadata), slots, 8 + len(text))


def _lay_out(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Slot]:
    for name, (dtype, _) in specs.items():
        if dtype not in _RANKS:
            raise FileError(f"tensor {quote(name)} is {dtype}, which a safetensors file cannot hold.")
        if name == "__metadata__":
            raise FileError("a tensor cannot be named '__metadata__': safetensors keeps that name for itself.")
    slots: dict[str, Slot] = {}
    begin = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: (-_RANKS[item[1][0]], item[0])):
        end = begin + _count_bytes(dtype, shape)
        slots[name] = Slot(dtype, shape, begin, end)
        begin = end
    return slots


def _count_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = math.prod(shape) * _DTYPES[_CODES[dtype]][1]
    if bits % 8:
        raise FileError(f"a {dtype} tensor of shape {list(shape)} does not end on a whole byte.")
    return bits // 8


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading. Raises FileError for what is not there, not readable, or no regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would wait for its writer
            raise FileError(f"{path}: is no regular file.")
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of the file at `path`; see `header_of`."""
    with open_regular(path) as file:
        return header_of(file, path)


def header_of(file: BinaryIO, path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of an open file; the tensors' bytes are not touched. `path` is for messages.

    Raises FileError, with one line that says what is wrong: not a safetensors file, cut short, longer than its header
    says, duplicate keys, unknown dtypes, and tensors that overlap, leave holes or differ from their shape in size.
    """
    document, data_start, size = _read_document(file, path)
    try:
        metadata = _check_metadata(document.pop("__metadata__", {}))
        slots = {name: _read_slot(name, entry) for name, entry in document.items()}
        ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_cover(ordered, size - data_start)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return Header(metadata, ordered, data_start)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's metadata alone, whatever the tensors are like. Raises FileError where there is no header."""
    with open_regular(path) as file:
        document, _, _ = _read_document(file, path)
    try:
        return _check_metadata(document.get("__metadata__", {}))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _read_document(file: BinaryIO, path: str | os.PathLike[str]) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, its end, and the file's size."""
    try:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        _check_length(length, len(prefix), size)
        text = file.read(length)
        if len(text) < length:
            raise FileError("the file was cut short while it was read.")
        return _parse(text), 8 + length, size
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _check_length(length: int, prefix: int, size: int) -> None:
    if size == 0:
        raise FileError("the file is empty.")
    if prefix < 8:
        raise FileError(f"not a safetensors file: {size} bytes are too few for one.")
    if not 2 <= length <= MAX_HEADER:
        raise FileError(f"not a safetensors file: it would begin with a header of {length} bytes.")
    if 8 + length > size:
        raise FileError(f"cut short or not a safetensors file: a header of {length} bytes in a file of {size}.")


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise FileError("not a safetensors file: its header is no JSON object.")
    document = parse_json(text, "the header")
    if not isinstance(document, dict):
        raise FileError("not a safetensors file: its header is no JSON object.")
    return document


def parse_json(text: bytes | str, what: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN. Raises FileError naming `what`."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise FileError(f"{what} is not valid JSON: {error.msg} (character {error.pos}).") from None
    except RecursionError:
        raise FileError(f"{what} is nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits, or one of the hooks below
        raise FileError(f"{what} is not valid JSON: {error}.") from None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {quote(key)} stands there twice")
        unique[key] = value
    return unique


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError("the header's '__metadata__' is not a map from strings to strings.")
    return metadata


def _read_slot(name: str, entry: object) -> Slot:
    where = f"tensor {quote(name)}"
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FileError(f"{where}: its name is not valid Unicode.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where}: its entry must hold dtype, shape and data_offsets, and nothing else.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise FileError(f"{where}: its dtype {quote(str(code))} is not known here; is the file newer than this reader?")
    if not _are_counts(shape) or len(shape) > MAX_RANK or math.prod(n for n in shape if n) > _MAX_COUNT:
        raise FileError(f"{where}: its shape is not a list of at most {MAX_RANK} sizes that fit into 63 bits.")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{where}: its data_offsets are not a begin and an end.")
    slot = Slot(_DTYPES[code][0], tuple(shape), *offsets)
    needed = _count_bytes(slot.dtype, slot.shape)
    if slot.nbytes != needed:
        raise FileError(f"{where}: shape {shape} in {code} is {needed} bytes, its data_offsets span {slot.nbytes}.")
    return slot


def _are_counts(values: object) -> bool:
    # type() and not isinstance(): JSON's true is no size
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def _check_cover(slots: Mapping[str, Slot], length: int) -> None:
    """The tensors in order must follow each other from 0 to the end of the file without overlap or hole."""
    position = 0
    for name, slot in slots.items():
        if slot.begin != position:
            fault = "overlaps the tensor before it" if slot.begin < position else "leaves a hole before it"
            raise FileError(f"tensor {quote(name)}: at byte {slot.begin} it {fault}, which ends at byte {position}.")
        position = slot.end
    if position > length:
        raise FileError(f"cut short: its tensors take {position} bytes, {length} are there. Copy the file again.")
    if position < length:
        raise FileError(f"{length - position} bytes follow the last tensor; a safetensors file ends with it.")
