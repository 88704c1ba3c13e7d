"""Writing a checkpoint as a folder: one file of tensors, or several with an index; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from padconvert.checkpoint.folder import CONFIG, INDEX, SINGLE, config_with, index_text, merged, plan_shards
from padconvert.checkpoint.header import Header, encode_header
from padconvert.checkpoint.layout import Spec, check_layout
from padconvert.checkpoint.manifest import Manifest, metadata_of
from padconvert.checkpoint.pieces import Contents
from padconvert.checkpoint.whole_folder import check_folder_target, put_folder, sibling_folder
from padconvert.checkpoint.write import WrittenFile, explain, survey, write_tensors
from padconvert.errors import FileError


def write_folder(
    path: str | os.PathLike[str],
    tensors: Contents,
    manifest: Manifest,
    *,
    max_shard_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
    force: bool = False,
    source: str | os.PathLike[str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> WrittenFile:
    """Writes `tensors` and `manifest` to the folder `path` in checkpoint format 1, as `write_checkpoint` does a file.

    A file holds at most `max_shard_size` bytes of tensors, but at least one layer. With `config` the folder is a
    transformers directory: that is its config.json, and the manifest goes there. `beside` puts further files into
    the unfinished folder; `check` sees it when it is complete, and by raising keeps it from getting its name.
    Raises UsageError where `check_folder_target` does, FileError where the tensors do not fit the manifest or the
    disk refuses; `path` is then as it was before.
    """
    check_folder_target(path, force=force, source=source)
    specs, manifest = survey(tensors, manifest)
    sizes = {name: slot.nbytes for name, slot in encode_header(specs, {})[1].tensors.items()}
    shards = plan_shards(specs, sizes, manifest, max_shard_size)
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        with sibling_folder(target) as temporary:
            headers = _write_shards(temporary, shards, tensors, specs, manifest, whole=config is None)
            check_layout(manifest, merged(headers, None, {}))
            if config is not None:
                text = json.dumps(config_with(config, manifest, specs), indent=2, sort_keys=True) + "\n"
                _write_text(temporary / CONFIG, text)
            if len(shards) > 1:
                metadata = metadata_of(manifest, specs) if config is None else {}
                _write_text(temporary / INDEX, index_text(shards, sizes, metadata))
            if beside is not None:
                beside(temporary)
            written = _written(temporary, headers)
            if check is not None:
                check(temporary)
            check_folder_target(path, force=force, source=source)  # again: something may have come up meanwhile
            put_folder(temporary, target)
    except OSError as error:
        raise FileError(f"{path}: {explain(error, sum(sizes.values()))}") from None
    return written


def _write_shards(
    folder: Path,
    shards: Mapping[str, list[str]],
    tensors: Contents,
    specs: Mapping[str, Spec],
    manifest: Manifest,
    *,
    whole: bool,
) -> dict[str, Header]:
    """The files of tensors; a single one carries the manifest where the folder is a checkpoint by itself (`whole`)."""
    headers: dict[str, Header] = {}
    for file, names in shards.items():
        metadata = metadata_of(manifest, specs) if whole and file == SINGLE else {"format": "pt"}
        encoded, headers[file] = encode_header({name: specs[name] for name in names}, metadata)
        with (folder / file).open("xb") as opened:
            write_tensors(opened, encoded, headers[file], manifest, tensors)
            os.fsync(opened.fileno())
    return headers


def _write_text(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _written(folder: Path, headers: Mapping[str, Header]) -> WrittenFile:
    size = sum(file.stat().st_size for file in files_in(folder))
    return WrittenFile(size, folder_sha256(folder), sum(header.data_start for header in headers.values()))


def files_in(folder: Path) -> list[Path]:
    """All files under a folder, sorted by their path in it."""
    return sorted(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.relative_to(folder).as_posix()
    )


def folder_sha256(folder: Path) -> str:
    """One checksum of all files in a folder and their names: of lines `sha256  name` as the tool sha256sum prints
    them, sorted by name."""
    digest = hashlib.sha256()
    for path in files_in(folder):
        with path.open("rb") as file:
            one = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{one}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()
