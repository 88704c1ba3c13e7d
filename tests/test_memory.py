"""The estimate of a run's memory (`--max-memory`) against the resident memory of real runs, each in its own process.

`make soak` runs the slow ones too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the resident memory is read as Linux tells it", allow_module_level=True)

#: the allocator keeps more or less of what was freed, by 20 % from run to run
LEAST, MOST = 0.8, 2.0
TRAIN = {"data": ["data.npz"], "steps": 4, "batch_size": 8}
ADAMW = ["train.optimizer=adamw", "train.lr=0.001"]


def case(kind: str, width: int, layers: int, *sets: str, trained: bool = True, **options: Any) -> dict[str, Any]:
    given = {**(TRAIN if trained else {}), **options, "sets": [*(["partition.batches=2"] if trained else []), *sets]}
    return {"kind": kind, "width": width, "layers": layers, "options": given}


QUICK = {
    "data-free, a few layers": case("linear", 700, 3, trained=False),
    "trained, a few layers": case("linear", 500, 3, "partition.rounds=2"),
}
SLOW = {
    "trained, many layers": case("linear", 250, 20, "partition.rounds=2"),
    "data-free, one layer": case("linear", 2500, 1, trained=False),
    "data-free, larger": case("linear", 2000, 3, trained=False),
    "data-free, filters": case("linear", 1500, 3, trained=False, granularity="channel"),
    "data-free, convolutions": case("conv", 400, 3, trained=False),
    "data-free, 16 experts": case("linear", 1000, 3, trained=False, experts=16),
    "trained, one layer": case("linear", 1800, 1, "partition.rounds=2"),
    "trained, larger": case("linear", 1500, 3, "partition.rounds=2"),
    "trained, AdamW": case("linear", 1000, 3, "partition.rounds=2", *ADAMW),
    "trained, filters": case("linear", 1000, 3, "partition.rounds=2", granularity="channel"),
    "trained, convolutions": case("conv", 200, 3, "partition.rounds=2"),
    "trained, single samples": case("linear", 1000, 3, "partition.rounds=2", "partition.score=fisher"),
    "trained, without gradients": case("linear", 1000, 3, "partition.rounds=2", "partition.score=magnitude"),
    "trained, with controls": case("linear", 1000, 3, "partition.rounds=2", compare=True),
    "trained, converted layers only": case("linear", 1000, 3, "partition.rounds=2", "train.what=converted"),
}


def measured(spec: dict[str, Any], folder: Path) -> tuple[float, float]:
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("memory_runs.py")), "spec.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["estimate"], found["grew"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_estimate_is_what_a_run_takes(name: str, tmp_path: Path) -> None:
    estimate, grew = measured((QUICK | SLOW)[name], tmp_path)
    if name.startswith("data-free"):  # pages of files come and go: what is held beside them is in test_streaming.py
        assert 1e6 < grew <= estimate
        return
    assert grew > 60e6, "too small to tell"
    assert LEAST <= estimate / grew <= MOST, f"estimated {estimate / 1e6:.0f} MB, took {grew / 1e6:.0f} MB"
