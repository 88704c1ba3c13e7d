"""Sizes of an exported program that may vary: through a conversion, and into the program that is exported from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import zoo
from padconvert import ConvertOptions
from padconvert import export as export_artefact
from padconvert.convert import convert
from padconvert.errors import VerificationError
from padconvert.export.pt2 import TOLERANCE, write_pt2
from padconvert.export.sizes import Axis, Place, batch_axis
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.exported_lift import ExportedModule
from padconvert.load.exported_sizes import symbols_of
from padconvert.verify import distance
from padconvert.walk.probe import ProbeSpec, flat_outputs

EVERYTHING = "rules=[{name: '*', convert: true}]"
TOLERANCE_OF_EXPORTS = TOLERANCE[torch.float32]


def opened(path: Path) -> ExportedModule:
    module = open_source(path).module
    assert isinstance(module, ExportedModule)
    return module


class Sizes(nn.Module):
    """Two inputs, of which one is twice as long as the other, beside an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.relu(self.embed(torch.cat([x, x], 2)) + self.embed(y))
        out: Tensor = self.head(hidden.mean(2))
        return out


def bert_program(path: Path) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, _ = zoo.build("bert")
    batch, length = Dim("batch"), Dim("length", min=2, max=32)
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}

    def given(batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.arange(batch * length).reshape(batch, length) * 7 % 50
        return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.int64)}

    torch.export.save(torch.export.export(model, (), given(3, 12), dynamic_shapes=shapes), path)
    return model, [given(1, 12), given(5, 12), given(3, 2), given(6, 31)]


def images_program(path: Path) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, _ = zoo.build("segmentation_dict_output")
    auto = Dim.DYNAMIC
    shapes = ({0: Dim("batch", max=9), 2: Dim("height", min=8, max=64), 3: auto},)
    torch.export.save(torch.export.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=shapes), path)
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 3, 32, 32), (9, 3, 32, 32), (2, 3, 64, 32), (2, 3, 32, 40), (4, 3, 16, 48)]
    return model, [{"x": torch.randn(size, generator=generator)} for size in sizes]


def related_program(path: Path) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = Sizes().eval()
    batch, length = Dim("batch"), Dim("length", min=3, max=40)
    shapes = ({0: batch, 2: length}, {0: batch, 2: 2 * length})
    program = torch.export.export(model, (torch.randn(3, 3, 8), torch.randn(3, 3, 16)), dynamic_shapes=shapes)
    torch.export.save(program, path)
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 8), (5, 8), (3, 3), (2, 40)]
    return model, [
        {"x": torch.randn(b, 3, n, generator=generator), "y": torch.randn(b, 3, 2 * n, generator=generator)}
        for b, n in sizes
    ]


OPEN: dict[str, tuple[Callable[[Path], tuple[nn.Module, list[dict[str, Tensor]]]], dict[str, str]]] = {
    "bert": (bert_program, {"batch": "held at 4, 1, 3", "input_ids, dimension 1": "up to 32; held at 12, 13, 6"}),
    "images": (images_program, {
        "batch": "up to 9; held at 4, 1, 3", "input 0, dimension 2": "8 to 64; held at 32, 33, 16",
        "input 0, dimension 3": "held at 32, 33, 16",
    }),
    "related": (related_program, {"batch": "held at 4, 1, 3", "input 0, dimension 2": "3 to 40; held at 8, 9, 4"}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPEN))
def test_sizes_that_a_program_leaves_open_stay_open(name: str, tmp_path: Path) -> None:
    make, said = OPEN[name]
    model, calls = make(tmp_path / "model.pt2")
    # a few layers do where there are many: torch takes its time for each operation
    some = "rules=[{name: '*.1.output.dense', convert: true}]" if name == "bert" else EVERYTHING
    convert(tmp_path / "model.pt2", ConvertOptions(sets=(some,), granularity="channel"))
    artefact, program = tmp_path / "model.pad.safetensors", tmp_path / "out.pt2"
    loaded = load(artefact)
    checks = export_artefact(artefact, program).checks
    assert {check.name: check.detail for check in checks if check.value == "dynamic"} == said
    assert len([check for check in checks if check.limit == TOLERANCE_OF_EXPORTS]) == 2 + 2 * len(said)
    again = torch.export.load(program).module()
    for given in calls:
        with torch.no_grad():
            wanted = flat_outputs(model(**given))
            # of the artefact, of the program exported from it, and of that program read here again
            for module in (loaded, again, opened(program)):
                found = flat_outputs(module(*given.values()) if "x" in given else module(**given))
                assert distance(wanted, found)[1] <= 1e-4
    # and they would be open once more
    symbols = [each["symbols"] for each in opened(program).document["inputs"] if each["kind"] == "user"]
    assert symbols == relabelled(symbols, [each["symbols"] for each in users(tmp_path / "model.pt2")])


def users(path: Path) -> list[Any]:
    return [each for each in opened(path).document["inputs"] if each["kind"] == "user"]


def relabelled(wanted: list[Any], found: list[Any]) -> list[Any]:
    """`found` with the names of `wanted`: torch names a size as it likes, but each by one name."""
    names: dict[str, str] = {}
    for mine, theirs in zip(wanted, found, strict=True):
        for (_, name, *_), (_, other, *_) in zip(mine, theirs, strict=True):
            assert names.setdefault(other, name) == name
    return [[[dim, names[name], *rest] for dim, name, *rest in each] for each in found]


def test_sizes_of_a_module_are_found_by_trying(tmp_path: Path) -> None:
    """The channels and a flattened image are no sizes that may vary; a recurrent layer's length torch fixes."""
    found = {}
    for name in ("resnet", "bert", "vit", "gru_tuple_output"):
        model, probe = zoo.build(name)
        checks = write_pt2(model, probe, tmp_path / f"{name}.pt2")
        found[name] = {check.name: (check.value, check.held) for check in checks if isinstance(check.value, str)}
    (dynamic, fixed) = ("dynamic", True), ("fixed", False)
    assert found == {
        "resnet": {"batch": dynamic, "input 0, dimension 2": dynamic, "input 0, dimension 3": dynamic},
        "bert": {"batch": dynamic, "input_ids, dimension 1": dynamic},
        "vit": {"batch": dynamic},
        "gru_tuple_output": {"batch": dynamic, "input 0, dimension 1": fixed},
    }


class Branch(nn.Module):
    """Computes something else from a length of 10 on, and is traced at 8."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.linear, self.threshold = nn.Linear(4, 4), threshold

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if torch.compiler.is_compiling() or x.shape[1] < self.threshold else out * 2


def test_a_program_that_is_wrong_at_another_size_alone_is_not_written(tmp_path: Path) -> None:
    """At 8 samples of length 8 both agree; the export never sees the branch."""
    probe = ProbeSpec((zoo.floats(8, 4),), 0, "test")
    with pytest.raises(VerificationError, match="dimension 1 of 9"):
        write_pt2(Branch(9).eval(), probe, tmp_path / "out.pt2")
    assert not list(tmp_path.iterdir())
    assert write_pt2(Branch(99).eval(), probe, tmp_path / "out.pt2")


def test_a_promised_size_that_comes_out_fixed_or_narrower_is_no_success(tmp_path: Path) -> None:
    model, probe = zoo.build("gru_tuple_output")
    promised = [batch_axis(probe), Axis((Place(0, 1),), 16, 2, None, promised=True)]
    with pytest.raises(VerificationError, match="leaves it open, but the exported one refuses"):
        write_pt2(model, probe, tmp_path / "out.pt2", promised=promised)
    bert, tokens = zoo.build("bert")
    promised = [Axis((Place(0, 1),), 16, 2, 64, promised=True)]
    with pytest.raises(VerificationError, match=r"up to 64 in the program .* makes it up to 32"):
        write_pt2(bert, tokens, tmp_path / "out.pt2", promised=promised)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Symbol('s77', positive=True, integer=True)", [[0, "s77", 1, 0]]),
        ("Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))", [[0, "s0", 2, -1]]),
        ("Mul(Integer(-1), Symbol('s0', integer=True))", []),
        ("Mul(Symbol('s0', integer=True), Symbol('s1', integer=True))", []),
        ("FloorDiv(Symbol('s53', integer=True), Integer(2))", []),
        ("Integer(4)", []),
    ],
)
def test_a_size_as_torch_writes_it(text: str, wanted: list[Any]) -> None:
    assert symbols_of([{"as_expr": {"expr_str": text}}, {"as_int": 3}]) == wanted
