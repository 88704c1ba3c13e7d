"""Data-free conversion of a large state dict: time over that of copying it, and memory at the peak; and the bytes of
ResNet-50's checkpoint over those of its values and mask bits."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import padconvert
from benchmarks import made, nets
from benchmarks.commands import PADCONVERT, peak_anonymous, run
from benchmarks.rows import Row, Setting, Table, paired_row
from benchmarks.rows import run as run_table
from padconvert.checkpoint.read import read_checkpoint
from padconvert.paired import Effort, measure

WIDTH, LAYERS, QUICK_LAYERS = 512, 106, 5  # 9.4 MB a layer: 1 GB
EFFORT = Effort(rounds=7, least=5, seconds=300.0, warm_up=1)
DEPENDS = ("padconvert", "tests/benchmarks/conversion.py", "tests/benchmarks/copying.py", "tests/benchmarks/nets.py")
MEMORY_ROOM = 400 * 10**6  # bytes that a conversion may take beside four times the largest layer


def make_source(folder: Path, layers: int) -> Path:
    """A state dict of different numbers everywhere, so that nothing can be stored once that is not the same."""
    torch.manual_seed(0)
    path = folder / "source.pt"
    torch.save(nets.wide(layers, WIDTH).state_dict(), path)
    return path


def take(source: Path, granularity: str, layers: int, given: Setting) -> Row:
    """Convert and copy in turn; then convert once more and watch its memory."""
    folder = source.parent
    output = folder / f"{granularity}.pad.safetensors"
    convert = [
        *PADCONVERT, "convert", source.name, "--output", output.name, "--force", "--quiet",
        "--granularity", granularity,
        "--arch", "benchmarks.nets:wide", "--arch-arg", f"layers={layers}", "--arch-arg", f"width={WIDTH}",
        "--input-shape", "1,3,8,8",
    ]  # fmt: skip
    run(convert, folder, given.threads)
    size = output.stat().st_size
    copy = [sys.executable, "-m", "benchmarks.copying", source.name, "copy", str(size), str(given.threads)]
    calls: dict[str, Callable[[], object]] = {
        "copying": lambda: run(copy, folder, given.threads),
        "convert": lambda: run(convert, folder, given.threads),
    }
    found = measure(calls, given.effort(EFFORT))
    peak = peak_anonymous(convert, folder, given.threads)
    output.unlink()
    (folder / "copy").unlink()
    largest = 4 * 9 * WIDTH**2
    facts = {"bytes_source": source.stat().st_size, "bytes_output": size, "bytes_largest_layer": largest}
    memory = {"peak_anonymous_bytes": peak, "peak_over_limit": peak / (4 * largest + MEMORY_ROOM)}
    return paired_row(found, ("copying",), granularity=granularity, **facts, **memory)


def bytes_over_values(folder: Path) -> Row:
    """The whole file of a ResNet-50 with unequal experts over the bytes that its values and mask bits cannot do
    without; routers are in neither."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 64, 64)
    model = made.network(nets.resnet50(), inputs, "element")
    path = folder / "resnet50.pad.safetensors"
    padconvert.save(model, path, inputs=inputs, trust=("benchmarks",), force=True)
    needed = router = 0
    checkpoint = read_checkpoint(path)
    for name in checkpoint.header.tensors:
        tensor = checkpoint.tensor(name)
        size = tensor.numel() * tensor.element_size()
        if ".router." in name:
            router += size
        elif not name.endswith("_bitmask"):
            needed += size
    for entry in checkpoint.manifest.layers:
        needed += math.ceil(math.prod(entry.facts.weight_shape) / 8)
    size = path.stat().st_size
    path.unlink()
    return {
        "bytes": size,
        "bytes_router": router,
        "bytes_needed": needed,
        "bytes_over_needed": (size - router) / needed,
    }


def main(given: Setting) -> None:
    table = Table("conversion", given, DEPENDS)
    layers = QUICK_LAYERS if given.quick else LAYERS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table.row("ResNet-50's checkpoint", lambda: bytes_over_values(folder))

        def source() -> Path:
            path = folder / "source.pt"
            return path if path.exists() else make_source(folder, layers)

        for granularity in ("channel", "element"):
            table.row(granularity, lambda granularity=granularity: take(source(), granularity, layers, given))  # type: ignore[misc]


if __name__ == "__main__":
    run_table(main)
