"""Every error padconvert raises on purpose. The exit code is part of the class.

    PadconvertError            1    internal, the parent of all
    ├── UsageError             2    the call's words are off; output exists; a changed resume
    ├── PolicyError            3    the policy cannot be read, checked or applied
    ├── FileError              4    a file cannot be read, used or written; labels out of range; NaN weights
    ├── NothingEligibleError   5    no layer of the source can or may be converted
    ├── UnsafeError            6    the file asks for code that nobody named trusted
    ├── VerificationError      7    a receipt does not hold; non-finite loss or scores
    ├── GateError              8    a bound the user set was not met
    └── Interrupted          130    stopped by the user; `--work-dir` resumes

A message says where, what, and the next step. Names out of a file may stand in it: whatever of them could move a
terminal's cursor, start a line or turn the text around is escaped when the message is read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "") -> str:
    """The text with every character that is not printed as itself (control characters, line ends, marks that turn the
    direction) as its escape in JSON; characters in `keep` stay. The one place for names out of files."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in keep or unicodedata.category(letter) == "Zs"
        else _ESCAPES.get(letter) or _escape(letter)
        for letter in text
    )


def _escape(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


class PadconvertError(Exception):
    """The parent of every deliberate error. `exit_code` is what the command line returns."""

    exit_code = 1
    #: several problems at once stand on a line each
    several_lines = False

    def __str__(self) -> str:
        return printable(super().__str__(), "\n" if self.several_lines else "")


class UsageError(PadconvertError):
    exit_code = 2
    several_lines = True


class PolicyError(PadconvertError):
    exit_code = 3
    several_lines = True


class FileError(PadconvertError):
    exit_code = 4


class NothingEligibleError(PadconvertError):
    exit_code = 5


class UnsafeError(PadconvertError):
    exit_code = 6


class VerificationError(PadconvertError):
    exit_code = 7


class GateError(PadconvertError):
    """`gates` are all that were decided until then, met or not: name, value, bound, passed."""

    exit_code = 8

    def __init__(self, message: str, gates: Sequence[dict[str, object]] = ()) -> None:
        super().__init__(message)
        self.gates = list(gates)


class Interrupted(PadconvertError):
    """`reported`: what was done until then stands on stdout already, so no other document may."""

    exit_code = 130

    def __init__(self, message: str = "", *, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported
