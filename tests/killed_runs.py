"""Runs conversions that are killed half-way: `python killed_runs.py JOBS.json` forks one process a job.

A job is {"source", "options", "kill"}; `kill` is one of the moments below, or null for the first job, which runs
whole and before the forks, so that they need not import again what it imported. Prints the jobs' wait statuses as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import padconvert.checkpoint.write
import padconvert.finetune.resume
from padconvert import ConvertOptions, convert
from padconvert.progress import Silent


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Silent):
    """Kills the process where the stage `stage` begins, or (`step` above 0) after that many of its steps."""

    def __init__(self, stage: str, step: int) -> None:
        self.wanted, self.at, self.now = stage, step, ""

    def stage(self, name: str) -> None:
        self.now = name
        if name == self.wanted and self.at == 0:
            die()

    def step(self, done: int, total: int, **numbers: float) -> None:
        del total, numbers
        if self.now == self.wanted and done == self.at:
            die()


def die_in_save(number: int, *, whole: bool) -> None:
    """Kill in the `number`-th save of a training state: with half of the file written, or before it gets its name."""
    saves: list[Path] = []

    def dying(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        saves.append(path)
        save_file(tensors, path, metadata)
        if len(saves) == number:
            if not whole:
                os.truncate(path, path.stat().st_size // 2)
            die()

    vars(padconvert.finetune.resume)["save_file"] = dying


def die_in_write() -> None:
    """Kill with the artefact's bytes in the temporary file, which has not got its name yet."""
    write = padconvert.checkpoint.write.write_tensors

    def dying(*args: Any) -> str:
        write(*args)
        die()
        raise AssertionError("it lives")

    vars(padconvert.checkpoint.write)["write_tensors"] = dying


def run(job: dict[str, Any]) -> None:
    padconvert.finetune.resume.SAVE_EVERY = 0.0
    kill, progress = job["kill"], Silent()
    match kill:
        case {"stage": str(stage), "step": int(step)}:
            progress = Killer(stage, step)
        case {"save": int(number), "whole": bool(whole)}:
            die_in_save(number, whole=whole)
        case "write":
            die_in_write()
        case None:
            pass
        case _:
            raise SystemExit(f"unknown moment {kill}")
    given = dict(job["options"])
    for key in ("output", "work_dir"):
        given[key] = Path(given[key])
    given |= {key: tuple(given[key]) for key in ("data", "sets")}
    convert(job["source"], ConvertOptions(**given), progress)


def fork(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        run(job)
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, *others = json.loads(Path(sys.argv[1]).read_text())
    run(first)
    print(json.dumps([fork(job) for job in others]))
