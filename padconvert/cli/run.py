"""One call of the library with progress shown, then its result shown. Imported by commands when they run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from padconvert.checksum import Checksum
from padconvert.cli import stdout
from padconvert.errors import FileError, UsageError
from padconvert.options import ConvertOptions
from padconvert.report import json_document, terminal
from padconvert.report.progress import shown
from padconvert.results import Result


def run_convert(source: Path, options: ConvertOptions, *, as_json: bool, report: Path | None, quiet: bool) -> None:
    """Convert, then print the report; `report` gets the HTML file.

    Everything that can be refused without torch is refused before torch is imported.
    """
    resolved = options.resolve_policy()
    if report is not None:
        _check_report(report, (source, options.output, options.plan_out), force=options.force)
    checksum = Checksum(source) if source.is_file() else None  # beside the import, a second or more
    if not resolved.policy.data.train:
        # nothing is trained: torch's threads come after others' work, of this run too, and are not to spin for a core
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _nothing_collected():
        from padconvert.convert import convert

    with shown(quiet=quiet) as progress:
        result = convert(source, options, progress, checksum=checksum)
    if report is not None:
        from padconvert.checkpoint.whole_file import write_text
        from padconvert.report.html import page

        write_text(report, page(result))
    show(result, as_json=as_json)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is made in here stays: it is not looked through for garbage, now or later. A sixth of an import's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def show(result: Result, *, as_json: bool) -> None:
    """The report on stdout, or with `as_json` the one document instead."""
    if as_json:
        stdout.write(json_document.text(result))
    else:
        with stdout.named():
            terminal.show(result)


def _check_report(path: Path, others: Iterable[Path | None], *, force: bool) -> None:
    """A long run must not end in a report that cannot be written, or that takes another file's place."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path}: the report is an HTML file; name one that ends in .html")
    if not path.absolute().parent.is_dir():
        raise FileError(f"--report {path}: its folder does not exist")
    if path.is_dir():
        raise UsageError(f"--report {path}: is a folder; name a file")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise UsageError(f"--report {path}: this run reads or writes that file already; name another one")
    if path.exists() and not force:
        raise UsageError(f"--report {path}: exists; --force replaces it, --report names another file")
    target = Path(os.path.realpath(path))  # it is written beside itself, then renamed
    if not os.access(target.parent, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise FileError(f"--report {path}: cannot be written to")
