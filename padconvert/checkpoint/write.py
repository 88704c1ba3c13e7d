"""Writing a checkpoint: whole or not at all, and the same bytes for the same content.

The header comes first in the file and holds every tensor's crc32, so the tensors are gone through twice: once for
their checksums, once to be written. Either pass holds a few pieces at a time, so tensors that are made in pieces
stream. The first pass takes several tensors at once; in the second the file's sha256 is computed beside the writing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from padconvert.checkpoint.bitmask import PlacementChecks
from padconvert.checkpoint.header import Header, encode_header, quote
from padconvert.checkpoint.layout import Spec, all_expected, check_layout
from padconvert.checkpoint.manifest import Manifest, metadata_of
from padconvert.checkpoint.pieces import Content, Contents, bytes_of, place_of_content, spec_of_content
from padconvert.checkpoint.tensor_bytes import crc32_of
from padconvert.checkpoint.whole_file import sibling
from padconvert.checkpoint.whole_folder import sync
from padconvert.errors import FileError, PadconvertError, UsageError

#: pieces that wait between the one who makes and writes them and the one who hashes them
_AHEAD = 8

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """`bytes` is the whole file, `header_bytes` its header with the 8 length bytes."""

    bytes: int
    sha256: str
    header_bytes: int


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Contents,
    manifest: Manifest,
    *,
    force: bool = False,
    source: str | os.PathLike[str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> WrittenFile:
    """Writes `tensors` and `manifest` to `path` in checkpoint format 1.

    The manifest's `crc32` is filled in here; a tensor under several names is stored once, under its layer's first
    name or else the first in sorted order, and the other names join `aliases`. `source` is the file the model came
    from. Raises UsageError where `check_target` does, FileError where the tensors do not fit the manifest or the disk
    refuses; the folder is then as it was before.
    """
    check_target(path, force=force, source=source)
    specs, manifest = survey(tensors, manifest)
    encoded, header = encode_header(specs, metadata_of(manifest, specs))
    check_layout(manifest, header)
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        with sibling(target) as (temporary, file):
            digest = write_tensors(file, encoded, header, manifest, tensors)
            with syncing(file):
                if check is not None:
                    check(temporary)
            check_target(path, force=force, source=source)  # again: the file may have come up meanwhile
            temporary.replace(target)
            sync(target.parent)
    except OSError as error:
        raise FileError(f"{path}: {explain(error, header.file_size)}") from None
    return WrittenFile(header.file_size, digest, header.data_start)


def check_target(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    source: str | os.PathLike[str] | None = None,
    option: str = "-o",
) -> None:
    """Raises UsageError if `path` exists without `force`, is no file, or is the source; FileError if its folder is
    not there or cannot be written to. `option` is the one that names it. To be called before hours of work, not only
    after."""
    try:
        _check_target(Path(path), force, source, option)
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise FileError(f"{path}: cannot be written: {error}.") from None


def _check_target(path: Path, force: bool, source: str | os.PathLike[str] | None, option: str) -> None:
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UsageError(f"{path} is a link that leads in a circle; name another file with {option}.")
    if target.is_dir():
        raise UsageError(f"{path} is a folder; name a file to write, for instance {target / 'model.pad.safetensors'}.")
    if target.exists():
        if source is not None and Path(source).exists() and target.samefile(source):
            raise UsageError(f"{path} is the source itself, never overwritten; name another file with {option}.")
        if not target.is_file():
            raise UsageError(f"{path} is no regular file; name another one with {option}.")
        if not force:
            raise UsageError(f"{path} exists; --force replaces it, {option} names another file.")
    folder = target.parent
    if not folder.is_dir():
        raise FileError(f"{path}: the folder {folder} does not exist; make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"{path}: the folder {folder} cannot be written to.")


def survey(tensors: Contents, manifest: Manifest) -> tuple[dict[str, Spec], Manifest]:
    """The first pass: what is stored, the checksums, and which names mean the same tensor."""
    expected = all_expected(manifest)
    checks = PlacementChecks(manifest)
    specs: dict[str, Spec] = {}
    stored: dict[str, Content] = {}
    aliases = dict(manifest.aliases)
    places: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors, key=lambda name: (name not in expected, name)):
        tensor = tensors[name]
        spec = spec_of_content(name, tensor)
        place = place_of_content(tensor)
        kept = places.setdefault(place, name) if place else name
        # looked up again so that both are alive: a freed tensor's address may have been given to this one
        if kept != name and name not in expected and place_of_content(tensors[kept]) == place:
            aliases[name] = kept
            continue
        if spec == expected.get(name) and isinstance(tensor, Tensor):
            checks.check(name, tensor)
        specs[name] = spec
        stored[name] = tensor
    crc32 = dict(zip(stored, in_turn(_crc32, stored.values()), strict=True))
    return specs, dataclasses.replace(manifest, crc32=crc32, aliases=aliases)


def _crc32(content: Content) -> int:
    crc32 = 0
    for data in bytes_of(content):
        crc32 = crc32_of(data, crc32)
    return crc32


def in_turn(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` of every item, on as many threads as torch may use. The results do not depend on how many."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        running = [pool.submit(work, item) for item in items]
        try:
            return [each.result() for each in running]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_tensors(file: BinaryIO, encoded: bytes, header: Header, manifest: Manifest, tensors: Contents) -> str:
    """The second pass. Returns the sha256 of all that was written; `syncing` is left to do."""
    with Hashing() as sha256:
        sha256.update(encoded)
        file.write(encoded)
        for name in header.tensors:
            crc32 = 0
            for data in bytes_of(tensors[name]):
                sha256.update(data)
                crc32 = crc32_of(data, crc32)
                file.write(data)
            if crc32 != manifest.crc32[name]:
                raise PadconvertError(f"tensor {quote(name)} changed while it was being written.")
        file.flush()
        return sha256.hexdigest()


@contextlib.contextmanager
def syncing(file: BinaryIO) -> Iterator[None]:
    """Afterwards what was written is on the disk. It goes there while the caller reads it back: from memory.

    Raises OSError where the disk refuses.
    """
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(os.fsync, file.fileno())
        yield
        done.result()


class Hashing:
    """sha256 of what it is given, computed in a thread of its own while the caller goes on."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._waiting: queue.Queue[memoryview | bytes | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Hashing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def update(self, data: memoryview | bytes) -> None:
        self._waiting.put(data)

    def hexdigest(self) -> str:
        """Of all that was given; nothing can be given after it."""
        self.__exit__()
        return self._sha256.hexdigest()

    def _work(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._sha256.update(data)


def explain(error: OSError, size: int) -> str:
    """What the disk said, and the next step; `size` is what would have been written."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full; the file needs {size} bytes. Free some space, or name another place with -o."
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"its folder cannot be written to ({error.strerror}); name another place with -o."
        case _:
            return f"cannot be written: {error.strerror or error}."
