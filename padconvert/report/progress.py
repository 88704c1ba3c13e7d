"""Progress on a terminal: one bar on stderr that goes away when the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from padconvert.errors import printable
from padconvert.progress import Progress as ProgressProtocol
from padconvert.progress import Silent


@contextmanager
def shown(*, quiet: bool = False, console: Console | None = None) -> Iterator[ProgressProtocol]:
    """A `Progress` for the time of one run: a live bar on a terminal, silence elsewhere or with `quiet`."""
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Silent()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as live:
        yield Bar(live)


class Bar:
    """The live bar: one line, which is the current stage."""

    def __init__(self, live: Progress) -> None:
        self._live = live
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(name, total=None, numbers="")

    def step(self, done: int, total: int, **numbers: float) -> None:
        if self._task is None:
            self.stage("working")
        assert self._task is not None
        said = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._live.update(self._task, completed=done, total=total, numbers=said)

    def note(self, text: str) -> None:
        self._live.console.print(printable(text), style="dim", markup=False, highlight=False)
