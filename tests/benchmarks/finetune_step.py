"""One fine-tune step (forward, backward, SGD) of the CIFAR ResNet-20: static, fully dynamic, converted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks import made
from benchmarks.paper import in_the_papers_form
from benchmarks.rows import Row, Setting, Table, paired_row, run
from nets import resnet20
from padconvert.bench import synchronised
from padconvert.paired import Effort, measure

EFFORT = Effort(rounds=31, least=9, seconds=45.0)
DEPENDS = (
    "padconvert/layers",
    "tests/benchmarks/finetune_step.py",
    "tests/benchmarks/paper.py",
    "tests/benchmarks/made.py",
)
BATCH, QUICK_BATCH = 128, 16


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    # so small a rate that thousands of steps on one batch change nothing
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-6, momentum=0.9)

    def one() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return one


def take(batch: int, given: Setting) -> Row:
    torch.manual_seed(0)
    source = resnet20().to(given.device, given.dtype).eval()
    x = torch.randn(batch, 3, 32, 32, dtype=given.dtype, device=given.device)
    y = torch.randint(10, (batch,), device=given.device)
    element = made.network(source, x[:2], "element", fold=False)
    contenders = {
        "static": source,
        "fully dynamic": made.network(source, x[:2], "channel", ratio=1, fold=False),
        "channel": made.network(source, x[:2], "channel", fold=False),
        "element": element,
        "paper": in_the_papers_form(element),
    }
    calls = {name: synchronised(step(model, x, y), given.device) for name, model in contenders.items()}
    return paired_row(measure(calls, given.effort(EFFORT)), ("static", "paper"), batch=batch)


def main(given: Setting) -> None:
    table = Table("finetune_step", given, DEPENDS)
    batch = QUICK_BATCH if given.quick else BATCH
    table.row(f"ResNet-20, B {batch}", lambda: take(batch, given))


if __name__ == "__main__":
    run(main)
