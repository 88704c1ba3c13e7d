"""What kind of input a path is, by its content and never by its suffix."""

from __future__ import annotations

import os
import zipfile
from enum import StrEnum
from pathlib import Path

from padconvert.checkpoint.header import open_regular
from padconvert.checkpoint.read import is_artefact
from padconvert.errors import FileError
from padconvert.load.archive import open_zip
from padconvert.load.directory_files import CONFIG, not_a_directory
from padconvert.load.reader import mentions_code


class InputKind(StrEnum):
    """What can be told from a file's first bytes and member names, without reading it."""

    PICKLE = "pickle"
    SAFETENSORS = "safetensors"
    ARTEFACT = "artefact"
    EXPORTED = "pt2"
    TORCHSCRIPT = "torchscript"
    TRANSFORMERS = "transformers"


_HEAD = 512
_NEXT = "Save the model with torch.save(model, 'model.pt'), or its state dict, and name that file"
_FOREIGN = (
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)


def detect(path: str | os.PathLike[str]) -> InputKind:
    """The kind of input at `path`. Raises FileError, with the next step, for what no reader here knows."""
    place = Path(path)
    if place.is_dir():
        return _detect_folder(place)
    try:
        with open_regular(place) as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise FileError(f"{place}: cannot be read ({error.strerror or error}). Check the path.") from error
    if not head:
        raise FileError(f"{place}: the file is empty. Save or download it again.")
    # a safetensors file begins with its header's length, and 19,280 is "PK" too; byte 8 of a zip is never a brace
    if head.startswith(b"PK") and head[8:9] != b"{":
        return _detect_zip(place)
    if is_artefact(place):
        return InputKind.ARTEFACT
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return InputKind.SAFETENSORS
    return _detect_rest(place, head)


def _detect_folder(place: Path) -> InputKind:
    if is_artefact(place):
        return InputKind.ARTEFACT
    if not (place / CONFIG).exists() and not (place / CONFIG).is_symlink():
        raise not_a_directory(place)
    return InputKind.TRANSFORMERS


def _detect_zip(place: Path) -> InputKind:
    try:
        with open_zip(place) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        # zipfile looks for the directory first, and calls a file without one no zip file at all
        why = "the directory at its end is missing" if "not a zip file" in str(error) else str(error)
        raise FileError(
            f"{place}: a zip archive that is damaged or cut off ({why}). Save or download it again."
        ) from error
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return InputKind.TORCHSCRIPT
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return InputKind.EXPORTED
    if "data.pkl" in names:
        return InputKind.PICKLE
    if any(name.endswith(".npy") for name in names):
        raise FileError(f"{place}: an .npz file holds arrays, not a model. Name data with --data. {_NEXT}.")
    raise FileError(f"{place}: a zip archive, but not one that torch.save wrote. {_NEXT}.")


def _detect_rest(place: Path, head: bytes) -> InputKind:
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise FileError(f"{place}: {what}, not a model saved by torch. {_NEXT}.")
    if head[257:262] == b"ustar":
        raise FileError(f"{place}: a tar file. Load it once with the torch it came from, then: {_NEXT}.")
    # protocols 0 and 1 have no mark of their own, but torch's old format begins with its magic number
    if head[0] == 0x80 or head.startswith(b"L119547037146038801333356L"):
        return InputKind.PICKLE
    if mentions_code(place):
        return InputKind.PICKLE
    if _is_text(head):
        raise FileError(f"{place}: a text file, not a saved model. {_NEXT}.")
    raise FileError(f"{place}: not a file of any kind known here. {_NEXT}.")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\r\n\t" for letter in text)


def refusal(kind: InputKind, path: str | os.PathLike[str]) -> FileError:
    """The error for a kind of input that is recognised but has no reader here."""
    match kind:
        case InputKind.TORCHSCRIPT:
            what = "TorchScript cannot be converted: export the model again with torch.export.save, save the module "
            what += "itself with torch.save, or give its state dict and --arch"
        case InputKind.ARTEFACT:
            what = "it is an artefact of padconvert already, not a source; padconvert.load(path) reads it"
        case _:
            raise AssertionError(kind)
    return FileError(f"{path}: {what}.")
