"""What a run stands in: its clock, its device and determinism, and how an interruption ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from padconvert.errors import Interrupted, UsageError
from padconvert.options import ConvertOptions


class Clock:
    """Seconds a stage took, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def usable(device: str) -> torch.device:
    """The device, once it has held a number. Raises UsageError."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # the meta device holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise UsageError(
            f"--device {device}: cannot be used ({why:.200}). 'padconvert doctor' lists the devices."
        ) from error
    return found


@contextmanager
def settled(device: str) -> Iterator[torch.device]:
    """The device, with deterministic algorithms for as long as the run lasts."""
    found = usable(device)
    # not use_deterministic_algorithms, which does the same but imports torch's compiler first: seconds
    before = torch.get_deterministic_debug_mode()
    state = torch.random.get_rng_state()
    # TF32 keeps 10 bits of a factor: two ways to compute one function would differ by more than any receipt allows
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.set_deterministic_debug_mode("warn")
    # it would also fill every new tensor with NaN before it is written to: a good part of a step
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    if found.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield found
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = filled
        if found.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.random.set_rng_state(state)


@contextmanager
def resumable(options: ConvertOptions) -> Iterator[None]:
    """Ctrl-C ends in a message that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if options.work_dir is None:
            raise Interrupted("Interrupted; nothing was written. With --work-dir DIR a run can be resumed.") from None
        reached = f"; {error}" if str(error) else ""
        raise Interrupted(
            f"Interrupted; no artefact was written{reached}. The same command goes on from {options.work_dir}."
        ) from None
