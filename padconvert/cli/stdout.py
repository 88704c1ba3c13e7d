"""The standard output may be closed or full: that is an error of its own, which names it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from padconvert.errors import FileError, printable


@contextmanager
def named() -> Iterator[None]:
    """What the system says about writing in here becomes a FileError on the standard output. A reader that left
    early (BrokenPipeError) is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"the standard output cannot be written to: {error.strerror or error}") from None


def write(text: str) -> None:
    """`text` on the standard output, now; what is not printable in it is escaped, so that JSON stays the same document.
    Raises FileError where it cannot be written to."""
    with named():
        sys.stdout.write(printable(text, "\n\t"))
        sys.stdout.flush()


def require_streams() -> None:
    """Give a closed stderr somewhere to go. Raises FileError for a closed stdout, before there is any work to lose.

    Python has None for a stream that was closed before it began (`>&-`), and the next file opened would be taken for
    it by everything that writes to its number.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's lifetime)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise FileError("the standard output is closed, so there is nowhere to report to; open it, or use >/dev/null")
