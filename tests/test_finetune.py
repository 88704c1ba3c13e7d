"""The loop, its phases, the optimizer that follows a partition, and routers set from data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from padconvert.errors import UsageError, VerificationError
from padconvert.finetune.data.examples import Batch, TensorExamples
from padconvert.finetune.data.preparation import Preparation, Prepared
from padconvert.finetune.data.sources import Data
from padconvert.finetune.loop import Run, Setting, _blame, finetune_, start
from padconvert.finetune.optimizer import follow_, make_optimizer, set_lr_
from padconvert.finetune.phases import Phases
from padconvert.finetune.train import Trainer, check_rounds
from padconvert.layers.pad import PadLayer
from padconvert.partition import Partitioner
from padconvert.plan import Plan, make_plan
from padconvert.policy import load_policy
from padconvert.progress import Silent
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.walk import walk


@dataclass(frozen=True)
class Steps:
    steps: int
    warmup: float
    partitioning: float
    schedule: str = "cosine"


def test_phases_are_counted_in_steps() -> None:
    phases = Phases.of(Steps(500, 0.2, 0.5), rounds=5)
    assert (phases.warmup, phases.round_steps) == (100, (150, 200, 250, 300, 350))
    assert [t for step in range(501) for t in phases.rounds_before(step)] == [1, 2, 3, 4, 5]
    assert [phases.warmed(step) for step in (0, 50, 100, 400)] == [0.0, 0.5, 1.0, 1.0]
    assert [round(phases.lr_factor(step), 6) for step in (0, 250, 500)] == [1.0, 0.5, 0.0]
    assert Phases.of(Steps(500, 0.2, 0.5, "constant"), 5).lr_factor(400) == 1.0


@pytest.mark.parametrize(("steps", "warmup", "span", "rounds"), [(1, 0.2, 0.5, 5), (3, 0.0, 1.0, 8), (7, 0.5, 0.5, 3)])
def test_every_round_happens_however_few_the_steps(steps: int, warmup: float, span: float, rounds: int) -> None:
    phases = Phases.of(Steps(steps, warmup, span), rounds)
    assert [t for step in range(steps + 1) for t in phases.rounds_before(step)] == list(range(1, rounds + 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(torch.relu(self.stem(x)))))
        out: Tensor = self.head(torch.relu(self.b(x.mean((2, 3)))))
        return out


def examples(n: int = 96, labels: bool = True, augment: tuple[str, ...] = ()) -> Data:
    """Three classes of images: bright at the top, in the middle, at the bottom; half of them inverted."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator) * 0.3
    for i, label in enumerate(y.tolist()):
        x[i, :, 2 * label : 2 * label + 2] += 2
    x[::2] *= -1
    prepared = Prepared(TensorExamples(x, y if labels else None), Preparation(augment=augment))
    return Data(prepared, prepared, ())


def planned(model: nn.Module, **settings: object) -> Plan:
    base: dict[str, object] = {"train.steps": 30, "train.batch_size": 16, "train.lr": 0.05, "partition.rounds": 2}
    base |= {"partition.batches": 2, "partition.micro_batch": 16}
    policy = load_policy(overrides=base | settings)
    sizes = {name: (tuple(t.shape), t.element_size()) for name, t in model.state_dict().items()}
    return make_plan(walk(model), policy, route="trained", seed=0, tensors=sizes)


def trained(data: Data, **settings: object) -> tuple[Net, nn.Module, Plan, list[dict[str, float]]]:
    """(source, trained model, plan, history)."""
    torch.manual_seed(0)
    source = Net()
    plan = planned(source, **settings)
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    trainer = Trainer.of(plan.policy, data, source, 0, torch.device("cpu"), Silent(), None)
    trainer.set_routers_(model, pad_layers(model))
    history = trainer.fit_(model, Partitioner(model, plan), "output")
    return source, model, plan, history


def test_training_lowers_the_loss_and_splits_the_experts() -> None:
    data = examples()
    source, model, plan, history = trained(data, **{"train.steps": 60, "train.lr": 0.01})
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    rounds = [(entry["step"], entry["ratio"]) for entry in history if "round" in entry]
    assert [step for step, _ in rounds] == [27, 42]
    assert rounds[-1][1] == pytest.approx(0.3)
    layers = pad_layers(model)
    assert list(layers) == ["a", "b"]
    entries = sum(len(layer.units("weight").dynamic) for layer in layers.values())
    assert entries == int(0.3 * (6 * 4 * 9 + 8 * 6) + 0.5) == sum(pool.target for pool in plan.pools)
    for layer in layers.values():
        assert layer.weight_dynamic is not None
        assert float((layer.weight_dynamic[0] - layer.weight_dynamic[1]).detach().abs().max()) > 1e-4
    assert not torch.equal(source.stem.weight, model.get_parameter("stem.weight"))


def test_a_run_is_a_function_of_its_seed() -> None:
    first, second = (trained(examples())[1].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_converted_trains_nothing_else() -> None:
    source, model, _, _ = trained(examples(), **{"train.what": "converted"})
    assert torch.equal(source.stem.weight, model.get_parameter("stem.weight"))
    assert torch.equal(source.head.weight, model.get_parameter("head.weight"))
    layer = model.get_submodule("a")
    assert isinstance(layer, PadLayer)
    assert float((layer.expert_tensors("weight")[0] - source.a.weight).detach().abs().max()) > 1e-4


def test_frozen_weights_stay_and_routers_can_be_held() -> None:
    torch.manual_seed(0)
    source = Net()
    source.stem.weight.requires_grad_(False)
    plan = planned(source, **{"train.router_lr_scale": 0.0})
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    trainer = Trainer.of(plan.policy, examples(), source, 0, torch.device("cpu"), Silent(), None)
    before = {name: value.clone() for name, value in model.state_dict().items() if "router" in name or "stem" in name}
    trainer.fit_(model, Partitioner(model, plan), "output")
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"stem.bias"}


def test_without_labels_distillation_trains_on_augmented_inputs() -> None:
    data = examples(labels=False, augment=("flip",))
    _, model, _, history = trained(data)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert len(pad_layers(model)["a"].units("weight").static) > 0


def test_a_loss_that_is_not_finite_names_its_layer() -> None:
    with pytest.raises(VerificationError, match=r"not finite at step \d+, first seen in (parameter|the output)"):
        trained(examples(), **{"train.lr": 1e30})


def test_a_loss_that_is_not_finite_is_traced_to_where_that_began() -> None:
    net, images = Net(), torch.zeros(2, 1, 6, 6)
    at = cast(Run, SimpleNamespace(model=net, step=4))
    with torch.no_grad():
        net.b.bias.fill_(3e38)
        net.head.weight.fill_(3.0)
    assert "at step 5, first seen in the output of layer 'head'" in _blame(at, Batch(images, None))
    with torch.no_grad():
        net.b.bias.fill_(float("inf"))
    assert "at step 5, first seen in parameter 'b.bias'" in _blame(at, Batch(images, None))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_the_optimizers_state_follows_a_partition(optimizer: str, granularity: str) -> None:
    """After a round, surviving entries have the state they had, newly static ones their experts'; training goes on."""
    torch.manual_seed(0)
    model = Net()
    plan = planned(model, **{"train.optimizer": optimizer, "train.lr": 0.01, "defaults.granularity": granularity})
    rewrite_(model, plan)
    layer = pad_layers(model)["a"]
    made = make_optimizer(model, plan.policy.train)
    data = examples()

    def step() -> None:
        made.zero_grad()
        batch = data.train.batch(torch.arange(32))
        assert isinstance(batch.inputs, Tensor)
        assert batch.labels is not None
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        made.step()

    assert layer.scale_logit is not None
    with torch.no_grad():
        layer.scale_logit.fill_(0.5)
    for keep_every in (2, 4):
        step()
        assert layer.weight_dynamic is not None
        old_units = layer.units("weight")
        before = {key: value.clone() for key, value in made.state[layer.weight_dynamic].items()}
        static_before = {} if layer.weight_static is None else dict(made.state[layer.weight_static])
        mask = torch.arange(layer.view("weight").units) % keep_every == 0
        static_scale, dynamic_scale = layer.scales()
        follow_(made, layer.partition_("weight", mask, torch.ones(4) / 4))
        places = [old_units.dynamic.tolist().index(unit) for unit in layer.units("weight").dynamic.tolist()]
        assert layer.weight_static is not None
        known = torch.tensor([unit in old_units.static.tolist() for unit in layer.units("weight").static.tolist()])
        joined = [unit for unit in layer.units("weight").static.tolist() if unit in old_units.dynamic.tolist()]
        came = [old_units.dynamic.tolist().index(unit) for unit in joined]
        assert set(made.state[layer.weight_static]) == set(before)
        for key in set(before) - {"step"}:
            torch.testing.assert_close(made.state[layer.weight_dynamic][key], before[key][:, places])
            moved = made.state[layer.weight_static][key]
            if static_before:
                torch.testing.assert_close(moved[known], static_before[key])
            experts = before[key][:, came]
            ratio = static_scale / dynamic_scale
            expected = (experts.sqrt().sum(0) * ratio) ** 2 if key == "exp_avg_sq" else experts.sum(0) * ratio
            torch.testing.assert_close(moved[~known], expected)
        if optimizer == "adamw":
            assert made.state[layer.weight_static]["step"] == before["step"]
        held = {id(p) for group in made.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        experts = {id(p) for name, p in model.named_parameters() if "_dynamic" in name}
        assert {id(p) for p in made.param_groups[1]["params"]} == experts
    static = layer.weight_static
    assert static is not None
    value = static.detach().clone()
    step()
    assert not torch.equal(value, static)


def test_experts_have_a_rate_of_their_own() -> None:
    """Newly static entries have it no more."""
    torch.manual_seed(0)
    model = Net()
    plan = planned(model, **{"train.optimizer": "sgd", "train.momentum": 0.0, "train.expert_lr_scale": 3.0})
    rewrite_(model, plan)
    layer = pad_layers(model)["a"]
    made = make_optimizer(model, plan.policy.train)
    follow_(made, layer.partition_("weight", torch.arange(layer.view("weight").units) % 2 == 0, torch.ones(4) / 4))
    set_lr_(made, 0.125)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    for group in made.param_groups:
        group["weight_decay"] = 0.0
    made.step()
    for name, parameter in model.named_parameters():
        factor = 3.0 if "_dynamic" in name else 0.1 if "router" in name else 1.0
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, factor * 0.0625), atol=1e-6, rtol=0
        )


def test_a_kept_run_goes_on_where_it_was() -> None:
    """`Run` holds all that a step needs: stopping between steps changes nothing."""
    torch.manual_seed(0)
    source = Net()
    plan = planned(source)
    trainer = Trainer.of(plan.policy, examples(), source, 0, torch.device("cpu"), Silent(), None)

    class Stop(Exception):
        pass

    class StopAt:
        def restore_(self, run: Run) -> None:
            pass

        def step_done(self, run: Run) -> None:
            if run.step == 17:
                raise Stop

        def save(self, run: Run) -> None:
            pass

    def fresh() -> Run:
        model = copy.deepcopy(source)
        rewrite_(model, plan)
        return start(model, Partitioner(model, plan), trainer.setting)

    whole, halved = fresh(), fresh()
    finetune_(whole, trainer.setting, Silent())
    held = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in whole.model.parameters()}, "the optimizer follows every round"
    setting: Setting = trainer.setting
    with pytest.raises(Stop):
        finetune_(halved, setting, Silent(), StopAt())
    finetune_(halved, setting, Silent())
    assert halved.step == 30
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in halved.model.state_dict().items())


def test_too_few_steps_are_refused_before_training() -> None:
    check_rounds(load_policy(overrides={"train.steps": 3}).policy)
    check_rounds(load_policy(overrides={"train.steps": 1, "partition.score": "magnitude"}).policy)
    with pytest.raises(UsageError, match=r"train\.steps 1: the first of 5 partition rounds would come before any step"):
        check_rounds(load_policy(overrides={"train.steps": 1}).policy)
