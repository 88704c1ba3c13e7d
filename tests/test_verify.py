"""The receipts themselves: each must be able to fail."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import padconvert
from padconvert.__main__ import main
from padconvert.errors import FileError, VerificationError
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.verify import distance, equality, equality_by_weights, verify
from padconvert.walk.probe import InputSpec, ProbeSpec

PROBE = ProbeSpec((InputSpec(None, (4,), "float32"),), 0, "the test's own")


class Switched(nn.Module):
    """Calls its middle layer only while `through` is set."""

    through = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.through:
            x = x + self.middle(x)
        out: Tensor = self.head(x)
        return out


def rewritten() -> tuple[Switched, Switched]:
    torch.manual_seed(0)
    source = Switched()
    plan = padconvert.plan(source, inputs=torch.randn(2, 4))
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    assert set(pad_layers(model)) == {"first", "middle"}
    return source, model


def test_equal_models_pass_by_outputs_and_by_weights() -> None:
    source, model = rewritten()
    by_outputs = equality(source, model, PROBE)
    assert (by_outputs.method, by_outputs.passed, by_outputs.samples) == ("forward", True, 8)
    by_weights = equality_by_weights(source, model)
    assert (by_weights.method, by_weights.passed, by_weights.max_abs_diff) == ("weights", True, 0.0)


@pytest.mark.parametrize("expert", [0, 3])
def test_one_changed_expert_is_seen(expert: int) -> None:
    source, model = rewritten()
    with torch.no_grad():
        weight = pad_layers(model)["middle"].weight_dynamic
        assert weight is not None
        weight[expert] += 0.01
    assert not equality(source, model, PROBE).passed
    by_weights = equality_by_weights(source, model)
    assert not by_weights.passed
    assert by_weights.max_abs_diff == pytest.approx(0.01, rel=1e-4)


def test_a_converted_layer_that_is_never_called_is_a_failure() -> None:
    source, model = rewritten()
    source.through = model.through = False
    with pytest.raises(VerificationError, match="'middle' was converted but the model's forward never calls it"):
        equality(source, model, PROBE)


def test_models_that_cannot_be_called_are_held_by_their_weights() -> None:
    source, model = rewritten()
    wrong = ProbeSpec((InputSpec(None, (5,), "float32"),), 0, "the test's own")
    assert equality(source, model, wrong).method == "weights"
    assert equality(source, model, None).method == "weights"


def test_the_mode_of_both_models_is_kept() -> None:
    source, model = rewritten()
    source.train()
    model.eval()
    equality(source, model, PROBE)
    assert source.training
    assert not model.training


def test_distances() -> None:
    inf, nan = float("inf"), float("nan")
    assert distance([torch.tensor([1.0, -4.0])], [torch.tensor([1.5, -4.0])]) == (0.5, 0.125)
    assert distance([torch.tensor([inf, nan, 2.0])], [torch.tensor([inf, nan, 2.0])]) == (0.0, 0.0)
    assert distance([torch.tensor([inf, 2.0])], [torch.tensor([1.0, 2.0])])[0] == inf
    assert distance([torch.tensor([1.0])], [torch.tensor([nan])])[0] == inf
    assert distance([torch.zeros(2)], [torch.tensor([0.0, 0.25])]) == (0.25, 0.25)
    assert distance([torch.zeros(2)], [torch.zeros(3)]) == (inf, inf)
    assert distance([torch.zeros(2)], []) == (inf, inf)


@pytest.fixture
def converted(in_tmp: Path) -> Path:
    """A source and its data-free artefact, beside another model of the same kind and one of another."""
    torch.manual_seed(0)
    for name in ("model", "other"):
        torch.save(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), f"{name}.pt")
    torch.save(Switched().first, "stranger.pt")
    result = padconvert.convert("model.pt")
    assert result.output is not None
    return in_tmp / result.output.path


@pytest.mark.parametrize("wrong", ["other.pt", "stranger.pt"])
def test_against_another_file_the_advice_is_to_name_the_right_one(
    converted: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(converted), "--against", wrong]) == 7
    said = capsys.readouterr()
    assert "✗ source sha256" in said.out
    assert said.err.endswith("does not hold: source sha256. Name the file it was made from with --against.\n")
    assert main(["verify", str(converted), "--against", "model.pt"]) == 0
    assert "✓ same function as the source" in capsys.readouterr().out


def test_data_alone_is_measured_and_held_against_nothing(converted: Path) -> None:
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(16, 4)).astype("float32"), y=np.arange(16) % 2)
    alone = verify(converted, data=("data.npz",)).checks[-1]
    assert (alone.name, alone.held, alone.limit) == ("accuracy", False, None)
    assert alone.detail == "measured; nothing to hold it against"
    beside = verify(converted, against=Path("model.pt"), data=("data.npz",)).checks[-1]
    assert (beside.held, beside.value) == (True, alone.value)


@pytest.mark.parametrize("name", ["model.pt", "protocol2.pt", "plain.safetensors"])
@pytest.mark.usefixtures("converted")
def test_what_is_no_artefact_is_called_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({}, "protocol2.pt", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(2)}, "plain.safetensors")
    assert main(["verify", name]) == 4
    said = "this is not an artefact of padconvert; verify takes what convert wrote"
    assert capsys.readouterr().err.startswith(f"error: {name}: {said}")
    with pytest.raises(FileError, match=said):
        padconvert.load(name)


@pytest.mark.usefixtures("converted")
def test_a_report_that_is_there_is_kept_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.html").write_text("mine")
    words = ["convert", "model.pt", "-o", "new.st", "--report", "r.html"]
    assert main(words) == 2
    assert (
        capsys.readouterr().err == "error: --report r.html: exists; --force replaces it, --report names another file\n"
    )
    assert (Path("r.html").read_text(), Path("new.st").exists()) == ("mine", False)
    assert main(["convert", "model.pt", "--dry-run", "--plan-out", "r.html"]) == 2
    assert capsys.readouterr().err == "error: r.html exists; --force replaces it, --plan-out names another file.\n"
    assert main(["convert", "model.pt", "-o", "r.html", "--report", "r.html", "--force"]) == 2
    assert main([*words, "--force"]) == 0
    assert "<html" in Path("r.html").read_text()


def test_an_artefact_of_trusted_code_names_both_ways(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "verifynet.py").write_text(
        "from torch import nn\n\n\nclass Own(nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x)\n"
    )
    sys.path.insert(0, str(in_tmp))
    try:
        own = importlib.import_module("verifynet").Own(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        torch.save(own, "own.pt")
        assert main(["convert", "own.pt", "--trust", "verifynet"]) == 0
        assert main(["verify", "own.pad.safetensors"]) == 6
        said = capsys.readouterr().err
        assert said.startswith("error: own.pad.safetensors: ")
        assert "--trust verifynet" in said
        assert "into=" in said
        assert main(["verify", "own.pad.safetensors", "--trust", "verifynet"]) == 0
    finally:
        sys.path.remove(str(in_tmp))
