"""Readers: one file each, its name is the kind of data it reads; this folder is the list.

To add one, add a file with

* `TAKES`: what it reads, in a few words for messages
* `matches(ref)`: whether `ref`, as the user wrote it, is for this reader
* `read(refs, spec)`: all of `refs` as one `Examples`, with the channels first and the raw values, or as a `TextTable`
  that is still to be tokenised. Raises `FileError`
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Protocol, cast

from padconvert.errors import FileError
from padconvert.finetune.data.examples import Examples
from padconvert.finetune.data.spec import DataPolicy
from padconvert.finetune.data.text import TextTable


class Reader(Protocol):
    """What every module in this folder offers."""

    __name__: str
    TAKES: str

    def matches(self, ref: str) -> bool: ...
    def read(self, refs: Sequence[str], spec: DataPolicy) -> Examples | TextTable: ...


def readers() -> list[Reader]:
    """All readers, by name. Their own dependencies are imported only when they read."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [cast(Reader, importlib.import_module(f"{__name__}.{name}")) for name in names]


def read(refs: Sequence[str], spec: DataPolicy) -> Examples | TextTable:
    """All of `refs` as one set of examples, or of texts.

    Raises `FileError` for what no reader, or more than one, takes.
    """
    chosen = {ref: _reader_of(ref) for ref in refs}
    kinds = {reader.__name__.rpartition(".")[2] for reader in chosen.values()}
    if len(kinds) > 1:
        raise FileError(f"{', '.join(refs)}: cannot read {' and '.join(sorted(kinds))} together. Name one kind of data")
    return next(iter(chosen.values())).read(refs, spec)


def _reader_of(ref: str) -> Reader:
    for reader in readers():
        if reader.matches(ref):
            return reader
    known = "; ".join(reader.TAKES for reader in readers())
    raise FileError(f"{ref}: no reader takes this kind of data. Known: {known}")
