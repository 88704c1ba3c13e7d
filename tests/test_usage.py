"""How experts are used, and kept in use: shares and entropies, collapse, the first routing's balance, the losses that
training adds; and that a new head is trained alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from padconvert.finetune import loop, objectives
from padconvert.finetune.balance import balancing_loss
from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.examples import TensorExamples
from padconvert.finetune.data.preparation import Preparation, Prepared
from padconvert.finetune.data.sources import Data
from padconvert.finetune.head import train_head_
from padconvert.finetune.usage import collapse_warnings, router_use
from padconvert.layers.build import upcycle
from padconvert.layers.collecting import Note
from padconvert.layers.kmeans import balancing_bias
from padconvert.policy import load_policy
from padconvert.progress import Silent
from padconvert.words import Granularity, Routing

CPU = torch.device("cpu")


def network(weight: list[list[float]], top_k: int) -> nn.Module:
    """A layer of two inputs whose router has these weights."""
    torch.manual_seed(0)
    layer = upcycle(
        nn.Linear(2, 3),
        num_experts=len(weight),
        granularity=Granularity.ELEMENT,
        router="linear",
        routing=Routing.TOKEN,
        learned_scales=False,
        generator=torch.Generator().manual_seed(0),
        top_k=top_k,
    )
    assert layer.router is not None
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(torch.tensor(weight))
    return nn.Sequential(layer)


def test_use_is_the_share_of_choices_and_its_entropy() -> None:
    x = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    (use,) = router_use(network([[9.0, 0.0], [0.0, 9.0]], top_k=1), TensorExamples(x), 2, CPU)
    assert (use.layer, use.usage) == ("0", (0.75, 0.25))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert use.usage_entropy == pytest.approx(expected)
    assert use.routing_entropy == 0  # one expert decides for every token
    assert (use.starved, use.collapsed) == (0, False)
    assert collapse_warnings((use,)) == []


def test_of_mixed_experts_it_is_the_mean_weight() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    (use,) = router_use(network([[0.0, 0.0], [0.0, 0.0]], top_k=0), TensorExamples(x), 2, CPU)
    assert use.usage == (0.5, 0.5)
    assert use.usage_entropy == pytest.approx(1)
    assert use.routing_entropy == pytest.approx(1)


def test_a_collapsed_router_and_starved_experts_are_named() -> None:
    x = torch.tensor([[1.0, 0.0]] * 20)
    (gone,) = router_use(network([[9.0, 0.0], [0.0, 9.0]], top_k=1), TensorExamples(x), 4, CPU)
    assert (gone.usage, gone.starved, gone.collapsed) == ((1.0, 0.0), 1, True)
    assert "1 of 1 routers have collapsed" in collapse_warnings((gone,))[0]
    even = [[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]]
    (starved,) = router_use(network(even, top_k=1), TensorExamples(torch.eye(2).repeat(15, 1)), 4, CPU)
    assert (starved.starved, starved.collapsed) == (1, False)
    assert "1 experts get less than 5%" in collapse_warnings((starved,))[0]
    (few,) = router_use(network([[9.0, 0.0], [0.0, 9.0]], top_k=1), TensorExamples(x[:19]), 4, CPU)
    assert (few.usage, few.starved, few.collapsed) == ((1.0, 0.0), 0, False)


def test_padding_counts_for_nothing() -> None:
    layer = network([[9.0, 0.0], [0.0, 9.0]], top_k=1)[0]  # type: ignore[index]

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            del attention_mask
            out: Tensor = self.layer(x)
            return out

    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    examples = TensorExamples({"x": x, "attention_mask": torch.tensor([[1, 0]])})
    (use,) = router_use(Reader(), examples, 1, CPU)
    assert use.usage == (1.0, 0.0)


def test_the_first_routing_is_balanced_whatever_the_clusters() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2000, 8, dtype=torch.float64) + torch.tensor([4.0, 2, 0, 0, 0, -1, -2, -3])

    def uneven(bias: Tensor) -> float:
        chosen = (logits + bias).topk(2, -1).indices
        return float((torch.bincount(chosen.flatten(), minlength=8) / 4000 * 8 - 1).abs().max())

    assert uneven(torch.zeros(8)) > 1.5
    assert uneven(balancing_bias(logits, 2)) < 0.15


def test_a_step_adds_the_balancing_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's gradient comes through them alone where all experts are equal."""
    seen: list[int] = []

    def counted(notes: list[Note], policy: object) -> Tensor | None:
        seen.append(len(notes))
        return original(notes, policy)  # type: ignore[arg-type]

    original = balancing_loss
    monkeypatch.setattr(loop, "balancing_loss", counted)
    moved = {}
    for weight in (0.0, 1.0):
        overrides = {"train.balance_weight": weight, "train.z_weight": 0.0, "train.optimizer": "sgd", "train.lr": 0.1}
        policy = load_policy(overrides={**overrides, "train.steps": 3, "train.what": "converted"}).policy
        model = network([[9.0, 0.0], [0.0, 9.0]], top_k=1)
        before = copy.deepcopy(model)
        examples = Prepared(
            TensorExamples(torch.tensor([[1.0, 0.2]] * 8), torch.zeros(8, dtype=torch.int64)), Preparation()
        )
        objective = objectives.Objective(task=True, distill_weight=0.0)
        setting = loop.Setting(policy, objective, None, Batches(examples, 4, 0), 0, CPU)
        loop.finetune_(loop.start(model, None, setting), setting, Silent())
        pairs = zip(model.named_parameters(), before.parameters(), strict=True)
        moved[weight] = max(float((a - b).detach().abs().max()) for (name, a), b in pairs if "router" in name)
    assert seen == [1] * 6
    assert moved[0.0] == 0
    assert moved[1.0] > 0


def test_a_new_head_is_trained_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(64, 2)
    data = Data(Prepared(TensorExamples(x, (x[:, 0] > 0).long()), Preparation()), None, ())
    policy = load_policy(overrides={"train.steps": 50, "train.head": 0.4, "train.head_lr": 0.1}).policy
    new = {"2.weight", "2.bias"}
    assert train_head_(model, new, data, policy, 0, CPU, Silent()) == 20
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == new
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert float((model(x).argmax(1) == (x[:, 0] > 0).long()).float().mean()) > 0.85
