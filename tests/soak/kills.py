"""kill -9 at more than fifty points of a trained conversion: the former output stays, a resumed run ends in the bytes
of an uninterrupted one, and nothing is left beside them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import killed_runs
import padconvert.checkpoint.write
from soak.fuzz import Outcome
from test_resume import STEPS, VARIANTS, Net

YESTERDAY = b"an artefact of yesterday"


def stage(name: str, step: int = 0) -> dict[str, Any]:
    return {"stage": name, "step": step}


#: every stage, every step, saves torn and whole, every write of the artefact, and the moments around its new name
POINTS: list[Any] = [
    *(stage(name) for name in ("load", "plan", "rewrite", "train", "write")),
    *(stage("train", step) for step in range(1, STEPS + 1)),
    *({"save": number, "whole": whole} for number in (1, 4, 7, 10, 13, 16, 20) for whole in (False, True)),
    *({"file_write": number} for number in range(1, 11)),
    "write",
    "renamed",
]


class Dying:
    """A file in whose `number`-th write the process is killed, after half of the bytes."""

    def __init__(self, file: Any, number: int) -> None:
        self.file, self.left = file, number

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.file.write(memoryview(data)[: len(data) // 2])
            self.file.flush()
            killed_runs.die()
        self.file.write(data)


def run(job: dict[str, Any]) -> None:
    match job["kill"]:
        case {"file_write": int(number)}:
            fdopen = os.fdopen
            vars(os)["fdopen"] = lambda descriptor, mode: Dying(fdopen(descriptor, mode), number)
        case "renamed":
            vars(padconvert.checkpoint.write)["sync"] = lambda _: killed_runs.die()
        case _:
            killed_runs.run(job)
            return
    killed_runs.run(job | {"kill": None})


def fork(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(job)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def prepare(folder: Path) -> Callable[[str, Any], dict[str, Any]]:
    """A source and data, and the artefact of a run in one go under `whole`; returns what makes a job of a name."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(nn.Sequential(*Net().eval()), folder / "model.pt")
    x = np.random.RandomState(0).randn(96, 1, 8, 8).astype("float32")
    np.savez(folder / "data.npz", x=x, y=np.random.RandomState(1).randint(0, 3, 96))

    def job(name: str, kill: Any) -> dict[str, Any]:
        (folder / name).mkdir(exist_ok=True)
        paths = {"output": str(folder / name / "out.st"), "work_dir": str(folder / name / "work")}
        options = {**VARIANTS["element_sgd"], **paths, "data": [str(folder / "data.npz")], "force": True}
        return {"source": str(folder / "model.pt"), "options": options, "kill": kill}

    assert fork(job("whole", None)) == 0
    return job


def kill_and_resume(job: Callable[[str, Any], dict[str, Any]], folder: Path, cases: range) -> Outcome:
    """The points `cases` of `POINTS`."""
    outcome, whole = Outcome(), (folder / "whole" / "out.st").read_bytes()
    for number in cases:
        outcome.cases += 1
        fault = _fault(job, folder / str(number), POINTS[number], whole)
        if fault:
            outcome.failures.append((number, f"{POINTS[number]}: {fault}"))
        else:
            outcome.ends["same"] += 1
        shutil.rmtree(folder / str(number))
    return outcome


def _fault(job: Callable[[str, Any], dict[str, Any]], place: Path, point: Any, whole: bytes) -> str | None:
    killed = job(place.name, point)
    (place / "out.st").write_bytes(YESTERDAY)
    status = fork(killed)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return f"it was not killed there (wait status {status})"
    if (place / "out.st").read_bytes() != (whole if point == "renamed" else YESTERDAY):
        return "the former output is not intact"
    if fork(job(place.name, None)) != 0:
        return "the run cannot be resumed"
    if (place / "out.st").read_bytes() != whole:
        return "the resumed run ended in other bytes"
    left = {path.name for path in place.iterdir()} - {"out.st", "work"}
    return f"left behind: {sorted(left)}" if left else None
