"""How long a command takes to say something: `--help`, `policy check`, and `inspect` of a large safetensors file."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import nets
from benchmarks.commands import PADCONVERT, run
from benchmarks.rows import Row, Setting, Table, more_than, paired_row
from benchmarks.rows import run as run_table
from padconvert.paired import Effort, measure

WIDTH, LAYERS, QUICK_LAYERS = 512, 106, 5
EFFORT = Effort(rounds=21, least=9, seconds=120.0)
DEPENDS = ("padconvert", "tests/benchmarks/startup.py", "tests/benchmarks/commands.py")
POLICY = "version: 1\nextends: paper\ndefaults: {dynamic_ratio: 0.3}\n"


def take(folder: Path, layers: int, given: Setting) -> Row:
    torch.manual_seed(0)
    large = folder / "large.safetensors"
    save_file(nets.wide(layers, WIDTH).state_dict(), large)
    (folder / "policy.yaml").write_text(POLICY, encoding="utf-8")
    words = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "--help": [*PADCONVERT, "--help"],
        "policy check": [*PADCONVERT, "policy", "check", "policy.yaml"],
        "inspect": [*PADCONVERT, "inspect", large.name],
    }
    calls = {name: lambda each=each: run(each, folder, given.threads) for name, each in words.items()}
    found = measure(calls, given.effort(EFFORT))
    row = paired_row(found, ("python -c pass",), bytes=large.stat().st_size)
    return {**row, "more": more_than(found, "python -c pass")}


def main(given: Setting) -> None:
    table = Table("startup", given, DEPENDS)
    with tempfile.TemporaryDirectory() as folder:
        table.row("commands", lambda: take(Path(folder), QUICK_LAYERS if given.quick else LAYERS, given))


if __name__ == "__main__":
    run_table(main)
