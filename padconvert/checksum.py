"""The sha256 of files. Without torch: a command begins to compute its source's while torch is still being imported."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from padconvert.errors import FileError

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The file's checksum, read in pieces. Raises FileError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One checksum for several files of a folder: that of the lines which the command `sha256sum` prints for them, in
    the order of their names' bytes. Raises FileError where one cannot be read."""
    ordered = sorted(paths, key=lambda path: path.name.encode())
    return hashlib.sha256("".join(f"{sha256_of(path)}  {path.name}\n" for path in ordered).encode()).hexdigest()


class Checksum:
    """The sha256 of a file, computed in a thread of its own from now on. A run that ends before waits for none."""

    def __init__(self, path: Path) -> None:
        self._found: str | FileError | None = None
        self._path = path
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._found = sha256_of(self._path)
        except FileError as error:
            self._found = error

    def value(self) -> str:
        """Waits for it. Raises FileError where the file cannot be read."""
        self._thread.join()
        if isinstance(self._found, FileError):
            raise self._found
        assert self._found is not None
        return self._found
