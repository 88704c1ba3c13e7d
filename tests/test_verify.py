"""The receipts themselves: each must be able to fail."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import padconvert
from padconvert.errors import VerificationError
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.verify import distance, equality, equality_by_weights
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
