"""A conversion whose peak memory is measured: `python memory_runs.py SPEC.json` prints estimate and growth in bytes.

A small run of the same kind comes first, so that what is imported or set up once is there already. The growth is the
peak resident memory above what the process held when the real run began.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from padconvert import ConvertOptions, convert

SMALL = 12
SAMPLES = 64


def linear(width: int, layers: int) -> nn.Module:
    inner = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), *inner, nn.Linear(width, 3))


def conv(width: int, layers: int) -> nn.Module:
    inner = [m for _ in range(layers) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
    )


KINDS = {"linear": (linear, (SAMPLES, 16)), "conv": (conv, (SAMPLES, 1, 6, 6))}


def run(spec: dict[str, Any], width: int) -> tuple[float, int]:
    """(the estimate, the resident bytes when the run began) of one conversion in the current directory."""
    make, shape = KINDS[spec["kind"]]
    torch.manual_seed(0)
    torch.save(make(width, spec["layers"]).eval(), "model.pt")
    x = np.random.RandomState(0).randn(*shape).astype("float32")
    np.savez("data.npz", x=x, y=np.random.RandomState(1).randint(0, 3, SAMPLES))
    given = {key: tuple(value) for key, value in spec["options"].items() if isinstance(value, list)}
    given = {**spec["options"], **given}
    options = ConvertOptions(output=Path("out.st"), force=True, max_memory=10**12, **given)  # type: ignore[arg-type]
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    (gate,) = convert("model.pt", options).gates
    return gate.value, before


def main() -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    run(spec, SMALL)
    estimate, before = run(spec, spec["width"])
    # not ru_maxrss, which begins at what the parent process held
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak_bytes = int(peak.split()[1]) * 1024
    print(json.dumps({"estimate": estimate, "grew": peak_bytes - before}))


if __name__ == "__main__":
    main()
