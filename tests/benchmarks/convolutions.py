"""Every convolution of ResNet-18 and ResNet-50 at 224 px alone: the static layer, ours, and the paper's form."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks import made, nets
from benchmarks.paper import in_the_papers_form
from benchmarks.rows import Row, Setting, Table, paired_row, run
from padconvert.bench import synchronised
from padconvert.layer_times import tuned_paths
from padconvert.paired import Effort, measure

EFFORT = Effort(rounds=31, least=5, seconds=2.0)
BATCHES, QUICK_BATCHES, QUICK_SHAPES = (1, 8, 32), (1, 8), 4
DEPENDS = (
    "padconvert/layers",
    "tests/benchmarks/convolutions.py",
    "tests/benchmarks/paper.py",
    "tests/benchmarks/made.py",
)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    kernel: int
    size: int  # of the input
    inputs: int
    outputs: int
    stride: int

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}×{self.kernel} {self.inputs}→{self.outputs} {self.size} px{stride}"


def shapes() -> list[Shape]:
    """The different 3×3 and 1×1 convolutions of both networks; the stem stays static."""
    found: set[Shape] = set()

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        if layer.in_channels > 3:
            found.add(
                Shape(layer.kernel_size[0], args[0].shape[-1], layer.in_channels, layer.out_channels, layer.stride[0])
            )

    with torch.device("meta"):
        for net in (nets.resnet18(), nets.resnet50()):
            for layer in net.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.register_forward_pre_hook(look)
            net(torch.empty(1, 3, 224, 224))
    return sorted(found)


def take(shape: Shape, batch: int, given: Setting) -> Row:
    conv = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2, bias=False)
    conv = conv.to(given.device, given.dtype).eval()
    element = made.convolution(conv, "element")
    contenders: dict[str, nn.Module] = {
        "static": conv, "channel": made.convolution(conv, "channel"), "element": element,
        "paper": in_the_papers_form(element),
    }  # fmt: skip
    x = torch.randn(batch, shape.inputs, shape.size, shape.size, dtype=given.dtype, device=given.device).relu_()
    calls = {name: synchronised(lambda layer=layer: layer(x), given.device) for name, layer in contenders.items()}  # type: ignore[misc]
    paths = {name: tuned_paths(contenders[name], (x,), {}).get("0", "") for name in ("channel", "element")}
    with torch.no_grad():
        found = measure(calls, given.effort(EFFORT))
    return paired_row(found, ("static", "paper"), batch=batch, paths=paths, **asdict(shape))


def main(given: Setting) -> None:
    table = Table("convolutions", given, DEPENDS)
    every = shapes()
    for shape in every[:: max(len(every) // QUICK_SHAPES, 1)] if given.quick else every:
        for batch in QUICK_BATCHES if given.quick else BATCHES:
            table.row(f"{shape}, B {batch}", lambda shape=shape, batch=batch: take(shape, batch, given))  # type: ignore[misc]


if __name__ == "__main__":
    run(main)
