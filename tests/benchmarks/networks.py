"""Whole networks at 224 px: static, converted at both granularities, and in the paper's form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from benchmarks import made, nets
from benchmarks.paper import in_the_papers_form
from benchmarks.rows import Row, Setting, Table, paired_row, run
from padconvert.bench import synchronised
from padconvert.layer_times import tuned_paths
from padconvert.paired import Effort, measure

EFFORT = Effort(rounds=21, least=5, seconds=30.0)
DEPENDS = (
    "padconvert/layers", "tests/benchmarks/networks.py", "tests/benchmarks/nets.py", "tests/benchmarks/paper.py",
    "tests/benchmarks/made.py",
)  # fmt: skip
NETS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "ResNet-50": (nets.resnet50, True),
    "ResNet-18": (nets.resnet18, True),
    "MobileNetV2": (nets.mobilenet_v2, False),
}
BATCHES, QUICK_BATCHES = (1, 8, 32), (1,)
PIXELS, QUICK_PIXELS = 224, 64


def contenders(name: str, pixels: int, given: Setting) -> dict[str, nn.Module]:
    make, beside_paper = NETS[name]
    torch.manual_seed(0)
    source = make().to(given.device, given.dtype).eval()
    x = torch.randn(2, 3, pixels, pixels, dtype=given.dtype, device=given.device)
    found = {"static": source, **{g: made.network(source, x, g).eval() for g in ("channel", "element")}}
    return {**found, "paper": in_the_papers_form(found["element"])} if beside_paper else found


def take(networks: dict[str, nn.Module], batch: int, pixels: int, given: Setting) -> Row:
    x = torch.randn(batch, 3, pixels, pixels, dtype=given.dtype, device=given.device)
    calls = {name: synchronised(lambda model=model: model(x), given.device) for name, model in networks.items()}  # type: ignore[misc]
    for name in ("channel", "element"):
        tuned_paths(networks[name], (x,), {})
    with torch.no_grad():
        found = measure(calls, given.effort(EFFORT))
    return paired_row(found, ("static", "paper"), batch=batch, pixels=pixels)


def main(given: Setting) -> None:
    table = Table("networks", given, DEPENDS)
    pixels = QUICK_PIXELS if given.quick else PIXELS
    for name in NETS:
        # made once, and only where a row of it is missing
        networks = cache(lambda name=name: contenders(name, pixels, given))
        for batch in QUICK_BATCHES if given.quick else BATCHES:
            table.row(
                f"{name}, B {batch}",
                lambda name=name, batch=batch, networks=networks: {  # type: ignore[misc]
                    "net": name, **take(networks(), batch, pixels, given)
                },
            )  # fmt: skip
        networks.cache_clear()


if __name__ == "__main__":
    run(main)
