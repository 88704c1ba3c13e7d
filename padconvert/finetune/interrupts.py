"""Interruptions that wait for the end of a training step, so that what is saved then is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Deferred:
    """While open, the first Ctrl-C (or SIGTERM) only sets `asked`; the second one acts at once.

    Outside the main thread, where signals do not arrive, it does nothing; so too where it is not `wanted`.
    """

    def __init__(self, wanted: bool) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}
        self._wanted = wanted and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Deferred:
        if self._wanted:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
