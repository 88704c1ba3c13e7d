"""A converted transformers model → a directory that transformers can load, with all that lay beside the source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import padconvert
from padconvert.checkpoint.folder import CONFIG, INDEX, SINGLE, count, own_part, read_object
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.layout import Spec
from padconvert.checkpoint.manifest import Manifest, Provenance
from padconvert.checkpoint.pieces import spec_of_content
from padconvert.checkpoint.save import Packed, directory_tensors, entries_of, record_of
from padconvert.checkpoint.write import WrittenFile
from padconvert.checkpoint.write_folder import write_folder
from padconvert.errors import FileError, UnsafeError
from padconvert.export.card import CardNumbers, model_card
from padconvert.walk.probe import ProbeSpec

CARD = "README.md"
SOURCE_CARD = "README.source.md"
#: endings of files at the top of a directory that hold the source's weights, or point to them, in some framework
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".pt", ".pth", ".ckpt", ".gguf",
    ".tflite",
)  # fmt: skip
#: folders that hold the same weights for another framework
_OTHER_FORMS = frozenset({"onnx", "openvino", "coreml", "original"})
_LABELS = frozenset({"id2label", "label2id"})


def save_directory(
    model: nn.Module,
    out: Path,
    *,
    source_dir: Path,
    architecture: Mapping[str, Any],
    provenance: Provenance,
    policy: Mapping[str, Any],
    trained: bool,
    probe: ProbeSpec | None = None,
    packed: Packed | None = None,
    max_shard_size: int | None = None,
    notes: Sequence[str] = (),
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> WrittenFile:
    """Writes a folded model of transformers as a directory beside which `source_dir` was: config.json with the
    manifest, the tensors (in files of at most `max_shard_size` bytes, by default as large as the source's), README.md,
    and a copy of every other file of the source, its weights in whatever form apart.

    `architecture` is {"kind": "transformers", "class", "config", …}. `notes` are lines for README.md on what was
    measured. `check` is called with the finished folder before it gets its name; by raising it keeps it from that.
    Raises UsageError and FileError as `write_folder` does, UnsafeError for a link that leads out of `source_dir`.
    """
    others = list(other_files(source_dir))
    entries = entries_of(model, trained=trained)
    tensors, aliases = directory_tensors(model, entries, packed)
    manifest = Manifest(
        padconvert=padconvert.__version__,
        layers=entries,
        architecture=dict(architecture),
        policy=dict(policy),
        provenance=provenance,
        trained=trained,
        probe=record_of(model, probe, packed),
        aliases=aliases,
    )
    specs = {name: spec_of_content(name, tensor) for name, tensor in tensors.items()}
    has_card = any(name in (CARD, SOURCE_CARD) for _, name in others)
    card = model_card(manifest, _numbers(specs, source_dir), notes, has_source_card=has_card)
    return write_folder(
        out,
        tensors,
        manifest,
        max_shard_size=source_shard_size(source_dir) if max_shard_size is None else max_shard_size,
        config=config_of(read_object(source_dir / CONFIG), architecture),
        beside=lambda folder: _put_others(folder, others, card),
        force=force,
        source=source_dir,
        check=check,
    )


def config_of(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json, with what the architecture says otherwise: its class and dtype, and a config that a
    new head has changed."""
    source = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    laid = _laid_over(source, architecture.get("config") or {})
    laid["architectures"] = [architecture["class"]]
    if "dtype" in architecture:
        laid["dtype"] = architecture["dtype"]
    return laid


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _laid_over(below[key], value)
        for key, value in above.items()
        if key not in _LABELS and isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **nested}


# ---- what lay beside the source's weights


def other_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, its path in the output) of all that is copied: no weights of the source in any form, no hidden folders.

    Raises UnsafeError for a link that leads out of the folder, FileError for what is no regular file.
    """
    is_ours = own_part(read_object(folder / CONFIG)) is not None
    for root, folders, files in os.walk(folder, onerror=_cannot_list):
        inner = Path(root).relative_to(folder)
        at_top = inner == Path()
        folders[:] = sorted(
            each for each in folders if not each.startswith(".") and not (at_top and each in _OTHER_FORMS)
        )
        for each in folders:
            _check_inside(Path(root, each), folder)
        for name in sorted(files):
            if at_top and (name == CONFIG or name.endswith(_WEIGHTS) or (is_ours and name == CARD)):
                continue
            path = Path(root, name)
            _check_inside(path, folder)
            if not path.is_file():
                raise FileError(f"{path}: is no regular file, and cannot be copied. Take it out of the directory.")
            yield path, SOURCE_CARD if at_top and name == CARD else (inner / name).as_posix()


def _cannot_list(error: OSError) -> None:
    raise FileError(f"{error.filename}: cannot be read ({error.strerror}).") from None


def _check_inside(path: Path, folder: Path) -> None:
    """A copy of what a link outside the folder leads to might give away what nobody meant to."""
    try:
        root, real = folder.resolve(), path.resolve()
    except RuntimeError:  # as Python 3.11 and 3.12 say; for later ones it is no regular file
        raise FileError(f"{path}: is a link that leads back to itself. Take it out of the directory.") from None
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not in_cache:
        raise UnsafeError(
            f"{path}: is a link that leads out of the directory, to {real}. Put the file itself into the directory."
        )
    if path.is_symlink() and path.is_dir():
        raise FileError(f"{path}: is a link to a folder, and cannot be copied. Put the folder itself in its place.")


def _put_others(folder: Path, others: Sequence[tuple[Path, str]], card: str) -> None:
    for source, name in others:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as read, target.open("xb") as written:
            shutil.copyfileobj(read, written)
            written.flush()
            os.fsync(written.fileno())
    with (folder / CARD).open("x", encoding="utf-8") as file:
        file.write(card)
        file.flush()
        os.fsync(file.fileno())


# ---- sizes


def _weight_files(folder: Path) -> list[Path]:
    """The files of the form that transformers would load."""
    for single, index in ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = read_object(folder / index).get("weight_map")
            files = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
            return [folder / name for name in files if Path(name).name == name and (folder / name).is_file()]
    return []


def source_shard_size(folder: Path) -> int | None:
    """Bytes of tensors in the source's largest file; None where it is not in several files."""
    files = _weight_files(folder)
    return max(_tensor_bytes(file) for file in files) if len(files) > 1 else None


def _tensor_bytes(file: Path) -> int:
    if file.suffix == ".safetensors":
        header = read_header(file)
        return header.file_size - header.data_start
    return file.stat().st_size


def _numbers(specs: Mapping[str, Spec], source_dir: Path) -> CardNumbers:
    stored = {name: spec for name, spec in specs.items() if not name.endswith(("_bitmask", "_index"))}
    return CardNumbers(
        bytes_source=sum(_tensor_bytes(file) for file in _weight_files(source_dir)),
        bytes_output=sum(slot.nbytes for slot in encode_header(specs, {})[1].tensors.values()),
        params_output=count(stored),
    )
