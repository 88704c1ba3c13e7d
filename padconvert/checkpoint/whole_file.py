"""A file that appears whole or not at all: written beside its place, synced, and renamed.

The file being written is called `.padconvert-<its output>-<random>.tmp` and is locked for as long as its writer lives.
So what a killed run left behind can be told from what another run is writing just now: only the former can be locked.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from padconvert.errors import FileError


@contextlib.contextmanager
def sibling(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside the target, gone again unless it was renamed. A kill leaves it behind, never a torn target;
    the next call for the same target takes it away."""
    _remove_leftovers(target)
    temporary, descriptor = _locked(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Puts a text file in its place, whole; a link stays a link. Raises FileError; `path` is then as it was before."""
    target = Path(os.path.realpath(path))
    try:
        with sibling(target) as (temporary, file):
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(target)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}). Name another place.") from error


def prefix_of(target: Path) -> str:
    """What the names of all files begin with that runs to this target put beside it."""
    # not the name itself, which may be as long as the system allows
    return f".padconvert-{zlib.crc32(os.fsencode(target.name)):08x}-"


def _locked(target: Path) -> tuple[Path, int]:
    while True:
        temporary = target.parent / f"{prefix_of(target)}{secrets.token_hex(8)}.tmp"
        # not tempfile: its files are private to the user, an artefact gets the permissions any new file gets
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            lock(descriptor, wait=True)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        os.close(descriptor)  # another run took it for a leftover before it was locked: take a new one


def _remove_leftovers(target: Path) -> None:
    """Takes away what killed runs left for this target. Whatever cannot be looked at stays."""
    for left in target.parent.glob(f"{prefix_of(target)}*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(descriptor, wait=False):
                    left.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the open file is now locked by this process: not where another one holds it, nor on a system or disk
    without such locks, where leftovers stay."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True
