"""Ctrl-C and SIGTERM, from the first moment of a command to its last, as KeyboardInterrupt; never inside an import.

An import that is broken off leaves half a module behind, and some (numpy, torch) catch what is raised in them: then the
run goes on as if nothing had been asked, or fails with an error that has nothing to do with it.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

_AGAIN = 0.02  # seconds until an interruption that met an import is tried again
_IMPORTING = "importlib._bootstrap"


@contextlib.contextmanager
def interruptible(inside: CodeType) -> Iterator[None]:
    """While open, both signals raise KeyboardInterrupt, as soon as nothing is being imported; SIGTERM only once, so
    that what was begun is cleaned up. `inside`: the code of the command's own function, behind which nobody looks.

    Outside the main thread it does nothing; a signal that is ignored stays so.
    """

    open_ = [True]

    def again(number: signal.Signals) -> None:
        time.sleep(_AGAIN)
        if open_:
            _thread.interrupt_main(number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame, inside):
            _thread.start_new_thread(
                again, (signal.Signals(number),)
            )  # `threading` takes locks, which what is interrupted may hold
            return
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as after:
        after.callback(open_.clear)
        _replace(signal.SIGTERM, signal.SIG_DFL, interrupt, after)
        _replace(signal.SIGINT, signal.default_int_handler, interrupt, after)
        yield


def _replace(number: signal.Signals, usual: object, handler: Callable[..., None], after: contextlib.ExitStack) -> None:
    if signal.getsignal(number) != usual:
        return
    try:
        before = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals are none of our business
        return
    after.callback(signal.signal, number, before)


def _is_importing(frame: FrameType | None, inside: CodeType) -> bool:
    while frame is not None and frame.f_code is not inside:
        if frame.f_globals.get("__name__") == _IMPORTING:
            return True
        frame = frame.f_back
    return False
