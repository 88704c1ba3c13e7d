"""A folder that appears whole or not at all: written beside its place, synced, and renamed.

An old folder in its place is renamed aside first, and removed once the new one is there. A kill between the two renames
leaves no folder of that name, but both beside it, whole; the next call for the same target puts the old one back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from padconvert.checkpoint.folder import carries_manifest
from padconvert.checkpoint.whole_file import lock, prefix_of
from padconvert.errors import FileError, UsageError


@contextlib.contextmanager
def sibling_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, gone again unless `put_folder` gave it its name. It is locked for as long as
    its writer lives, so that what a killed run left can be told from it."""
    settle(target)
    temporary, descriptor = _new_folder(target)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def _new_folder(target: Path) -> tuple[Path, int]:
    while True:
        temporary = target.parent / f"{prefix_of(target)}{secrets.token_hex(8)}.tmp"
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = _locked(temporary)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
            os.close(descriptor)
        # another run took it for a leftover before it was locked: make a new one


def put_folder(temporary: Path, target: Path) -> None:
    """Gives the folder its name. What stood there is gone afterwards; if the system refuses, it is as it was."""
    sync(temporary)
    if not target.exists():
        temporary.rename(target)
        sync(target.parent)
        return
    aside = target.parent / f"{prefix_of(target)}{secrets.token_hex(8)}.old"
    descriptor = _locked(target)
    try:
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        sync(target.parent)
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """So that the names in it outlive a power cut as the bytes do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(target: Path) -> None:
    """Clears up after killed runs to the same target: puts back a folder that was set aside if there is none in its
    place, and removes what was half written. What a live run holds stays."""
    for left in sorted(target.parent.glob(f"{prefix_of(target)}*")):
        if left.suffix not in (".old", ".tmp") or not left.is_dir() or left.is_symlink():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(descriptor, wait=False):
                    _settle_one(left, target)
            finally:
                os.close(descriptor)


def _settle_one(left: Path, target: Path) -> None:
    if left.suffix == ".tmp":
        shutil.rmtree(left, ignore_errors=True)
    elif not target.exists():
        left.rename(target)
    elif carries_manifest(target):  # and not where something else has come up meanwhile: it may be the only one
        shutil.rmtree(left, ignore_errors=True)


def _locked(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    lock(descriptor, wait=True)
    return descriptor


def check_folder_target(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    source: str | os.PathLike[str] | None = None,
    option: str = "-o",
) -> None:
    """Raises UsageError if `path` is a file, or a folder with anything in it unless `force` replaces an artefact of
    padconvert, or if it is the source, inside it or around it; FileError if its parent is not there or cannot be
    written to. To be called before hours of work, not only after."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise UsageError(f"{path} is a link that leads in a circle; name another folder with {option}.")
        _check_apart(target, path, source, option)
        if not target.parent.is_dir():
            raise FileError(f"{path}: the folder {target.parent} does not exist; make it first.")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise FileError(f"{path}: the folder {target.parent} cannot be written to.")
        settle(target)
        _check_free(target, path, force, option)
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise FileError(f"{path}: cannot be written: {error}.") from None


def _check_apart(target: Path, path: object, source: str | os.PathLike[str] | None, option: str) -> None:
    if source is None:
        return
    origin = Path(os.path.realpath(source))
    if target == origin:
        raise UsageError(f"{path} is the source itself, never overwritten; name another folder with {option}.")
    if target in origin.parents or origin in target.parents:
        raise UsageError(f"{path} and the source lie inside each other; name a folder apart from it with {option}.")


def _check_free(target: Path, path: object, force: bool, option: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{path} is a file, and a folder is to be written; name another place with {option}.")
    if not any(target.iterdir()):
        return
    if not carries_manifest(target):
        raise UsageError(
            f"{path} is a folder that holds something else than an artefact of padconvert, so it is never replaced; "
            f"name another one with {option}."
        )
    if not force:
        raise UsageError(f"{path} exists; --force replaces the whole folder, {option} names another one.")
