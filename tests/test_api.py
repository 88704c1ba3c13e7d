"""The steps of a conversion from Python: plan, rewrite_, one's own loop with a Partitioner, fold, save, load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import padconvert
from padconvert.checkpoint.read import read_checkpoint
from padconvert.errors import FileError, NothingEligibleError, PolicyError, UnsafeError, UsageError
from padconvert.layers.pad import PadLayer
from padconvert.load import open_source
from padconvert.plan.decide import in_force
from padconvert.policy import Policy, load_policy
from padconvert.rewrite import pad_layers

Build = Callable[[], nn.Module]


class Shared(nn.Module):
    """A class of the test's own: one convolution called twice, a tied pair, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.once = nn.Conv2d(6, 6, 1)
        self.again = self.once
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(x)) + torch.tanh(self.twice(x.flip(-1)))
        x = self.norm(self.again(self.once(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    )


def seeded(build: Build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def policy(**settings: object) -> Policy:
    given = {f"{name.replace('__', '.')}": value for name, value in settings.items()}
    return load_policy(overrides={"partition.rounds": 3, **given}).policy


def trained(model: nn.Module, plan: padconvert.api.Plan, rounds: bool = True) -> padconvert.Partitioner:  # type: ignore[name-defined]
    """A loop of the user's own: warm up, then a round, then steps, and so on; a new optimizer after each round."""
    x, y = images(48), torch.arange(48) % 3
    partitioner = padconvert.Partitioner(model, plan)
    for t in range(partitioner.rounds + 1):
        if t and rounds:
            losses = [
                lambda part=part: nn.functional.cross_entropy(model(x[part]), y[part])
                for part in torch.arange(48).split(16)
            ]
            partitioner.round_(t, losses)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
        model.train()
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
    return partitioner


def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(5, seed=9) if x is None else x)  # type: ignore[no-any-return]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def made(build: Build = chain, **settings: object) -> tuple[nn.Module, nn.Module]:
    """(the source, the trained and partitioned model)."""
    source = seeded(build)
    model = copy.deepcopy(source)
    plan = padconvert.plan(model, policy(**settings), inputs=images(2))
    padconvert.rewrite_(model, plan)
    trained(model, plan)
    return source, model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone() for name, value in (dict(model.named_parameters()) | dict(model.named_buffers())).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- plan and rewrite_ -------------------------------------------------------------------------------------------


def test_a_plan_touches_nothing_and_a_rewrite_computes_the_same() -> None:
    model = seeded(Shared)
    before, wanted = state(model), output(model)
    plan = padconvert.plan(model, inputs=images(2))
    assert same(state(model), before)
    layers = padconvert.rewrite_(model, plan)
    assert list(layers) == ["twice", "once"]
    assert model.again is model.once is layers["once"]
    assert relative(output(model), wanted) <= 1e-10


@pytest.mark.parametrize("given", ["paper", "small", None])
def test_a_policy_is_a_preset_a_file_or_nothing(given: str | None, tmp_path: Path) -> None:
    model = seeded(chain)
    path = tmp_path / "mine.yaml"
    path.write_text(f"version: 1\nextends: {given or 'paper'}\n")
    plan = padconvert.plan(model, given, inputs=images(2))
    said = in_force(load_policy(preset=given).policy, "trained", has_blocks=False)[0]
    assert plan.policy == padconvert.plan(model, path, inputs=images(2)).policy == said
    assert {float(entry.choice.dynamic_ratio) for entry in plan.layers if entry.choice} == (
        {0.1} if given == "small" else {0.3}
    )


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingEligibleError):
        padconvert.plan(nn.Sequential(nn.ReLU()))
    with pytest.raises(UsageError, match="papr"):
        padconvert.plan(seeded(chain), "papr")
    with pytest.raises(UsageError, match=r"policy='smal': .* Did you mean 'small'\?") as caught:
        padconvert.plan(seeded(chain), "smal")
    assert "--" not in str(caught.value)
    with pytest.raises(UsageError, match=r"policy=a dict: .*load_policy\(overrides="):
        padconvert.plan(seeded(chain), {"train.steps": 5})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'model\.pt' is no nn\.Module\. .* padconvert\.convert\(path\)"):
        padconvert.plan("model.pt")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="absent"):
        padconvert.plan(seeded(chain), tmp_path / "absent.yaml")
    lone = nn.Conv2d(2, 2, 3)
    rules = policy(rules=[{"name": "*", "convert": True}])
    with pytest.raises(PolicyError, match="container"):
        padconvert.rewrite_(lone, padconvert.plan(lone, rules))


def test_all_public_names_are_there_and_named() -> None:
    assert sorted(padconvert.__all__) == sorted(padconvert._HOMES)
    names: dict[str, object] = {}
    exec("from padconvert import *", names)
    assert names.keys() >= set(padconvert.__all__)
    assert names["plan"] is padconvert.api.plan


def test_a_converted_model_saved_by_torch_is_told_how_it_is_written(tmp_path: Path) -> None:
    model = seeded(chain)
    padconvert.rewrite_(model, padconvert.plan(model, inputs=images(2)))
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match=r"padconvert\.save\(model, path\)") as caught:
        open_source(tmp_path / "m.pt")
    assert "--trust" not in str(caught.value)


# ---- one's own loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_rounds_in_a_loop_of_ones_own_reach_the_planned_counts_and_learn(granularity: str) -> None:
    source = seeded(chain)
    model = copy.deepcopy(source)
    plan = padconvert.plan(model, policy(defaults__granularity=granularity, partition__scope="layer"), inputs=images(2))
    padconvert.rewrite_(model, plan)
    trained(model, plan)
    planned = {entry.info.name: entry.n_dynamic for entry in plan.layers if entry.choice}
    assert planned
    assert {name: layer.facts().n_dynamic for name, layer in pad_layers(model).items()} == planned
    x, y = images(48), torch.arange(48) % 3
    losses = [float(nn.functional.cross_entropy(output(each, x), y)) for each in (source, model)]
    assert losses[1] < losses[0] - 0.02


def test_a_round_before_the_experts_differ_is_refused() -> None:
    model = seeded(chain)
    plan = padconvert.plan(model, policy(), inputs=images(2))
    padconvert.rewrite_(model, plan)
    x, y = images(8), torch.arange(8) % 3
    with pytest.raises(padconvert.PadconvertError, match="experts are still equal"):
        padconvert.Partitioner(model, plan).round_(1, [lambda: nn.functional.cross_entropy(model(x), y)])


# ---- fold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"defaults.granularity": "channel"},
        {"defaults.router": "mlp"},
        {"defaults.scales": "none", "defaults.num_experts": 2},
        {"defaults.dynamic_ratio": "1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [chain, Shared])
def test_fold_keeps_the_function_and_its_argument(build: Build, settings: dict[str, object]) -> None:
    source, model = made(build, **{key.replace(".", "__"): value for key, value in settings.items()})
    for layer in pad_layers(model).values():
        dynamic = layer.weight_dynamic
        assert dynamic is not None
        assert float((dynamic - dynamic[:1]).detach().abs().max()) > 1e-4  # unequal experts, or the test shows nothing
    before, wanted = state(model), output(model)
    folded = padconvert.fold(model)
    assert same(state(model), before)
    assert relative(output(folded), wanted) <= 1e-10
    assert relative(output(padconvert.fold(folded)), wanted) <= 1e-10
    assert same(state(padconvert.fold(folded)), state(folded))
    assert relative(wanted, output(source)) > 1e-3
    assert all(layer.scale_logit is None for layer in pad_layers(folded).values())


def test_routing_matters_after_fold() -> None:
    """The folded model is not its mean expert: two inputs get different weights."""
    _, model = made()
    folded = padconvert.fold(model)
    wanted = output(folded)
    for layer in pad_layers(folded).values():
        with torch.no_grad():
            for parameter in layer.router.parameters():  # type: ignore[union-attr]
                parameter.zero_()
    assert relative(output(folded), wanted) > 1e-5


def test_no_dynamic_share_gives_the_plain_layers_back() -> None:
    source = seeded(chain)
    model = copy.deepcopy(source)
    plan = padconvert.plan(model, policy(defaults__dynamic_ratio="0"), inputs=images(2), route="data-free")
    padconvert.rewrite_(model, plan)
    padconvert.Partitioner(model, plan).round_(1, [])
    folded = padconvert.fold(model)
    assert [type(module) for module in folded.modules()] == [type(module) for module in source.modules()]
    assert same(state(folded), state(source))
    assert torch.equal(output(folded), output(source))


def test_a_partition_to_nothing_after_training_is_plain_too(tmp_path: Path) -> None:
    """κ = 0 with unequal experts on the way: the plain layers hold what the last round left."""
    source = seeded(chain)
    model = copy.deepcopy(source)
    plan = padconvert.plan(model, policy(defaults__dynamic_ratio="0.2"), inputs=images(2))
    padconvert.rewrite_(model, plan)
    trained(model, plan, rounds=False)
    for layer in pad_layers(model).values():
        uniform = torch.full((layer.num_experts,), 1 / layer.num_experts)
        for part in layer.parts:
            layer.partition_(part, torch.zeros(layer.view(part).units, dtype=torch.bool), uniform)
    folded = padconvert.fold(model)
    assert not pad_layers(folded)
    assert [type(module) for module in folded.modules()] == [type(module) for module in source.modules()]
    assert relative(output(folded), output(model)) <= 1e-10
    assert relative(output(folded), output(source)) > 1e-3
    padconvert.save(model, tmp_path / "plain.st")
    assert torch.equal(output(padconvert.load(tmp_path / "plain.st")), output(folded))


def test_all_dynamic_stores_no_static_part(tmp_path: Path) -> None:
    _, model = made(defaults__dynamic_ratio="1")
    padconvert.save(model, tmp_path / "full.st")
    loaded = padconvert.load(tmp_path / "full.st")
    assert pad_layers(loaded)
    for layer in pad_layers(loaded).values():
        stored = set(layer.state_dict())
        assert stored - {"router.weight", "router.bias"} == {"weight_dynamic", "bias_dynamic"}
        assert layer.facts().n_dynamic == layer.view("weight").units
    assert relative(output(loaded), output(model)) <= 1e-10


# ---- save and load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_a_model_comes_back_from_its_file_and_can_be_trained_on(granularity: str, tmp_path: Path) -> None:
    source, model = made(defaults__granularity=granularity)
    before = state(model)
    written = padconvert.save(model, tmp_path / "model.st", inputs=images(2))
    assert same(state(model), before)
    assert (tmp_path / "model.st").stat().st_size == written.bytes
    loaded = padconvert.load(tmp_path / "model.st")
    assert not loaded.training
    assert torch.equal(output(loaded), output(padconvert.fold(model)))
    assert relative(output(loaded), output(source)) > 1e-3
    into = padconvert.load(tmp_path / "model.st", into=seeded(chain))
    assert torch.equal(output(into), output(loaded))
    x, y = images(48), torch.arange(48) % 3
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(loaded(x), y)
    loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) for layer in pad_layers(loaded).values() for p in layer.parameters()
    )
    optimizer.step()
    assert float(nn.functional.cross_entropy(output(loaded, x), y)) < float(loss.detach())
    padconvert.save(loaded, tmp_path / "further.st")
    assert torch.equal(output(padconvert.load(tmp_path / "further.st")), output(loaded))


def test_a_class_of_ones_own_is_loaded_into_a_module_or_by_trust(tmp_path: Path) -> None:
    _, model = made(Shared)
    path = tmp_path / "model.st"
    padconvert.save(model, path, inputs=images(2))
    wanted = output(padconvert.fold(model))
    into = seeded(Shared)
    found = padconvert.load(path, into=into)
    assert found is into
    assert found.again is found.once
    assert isinstance(found.once, PadLayer)
    assert torch.equal(output(found), wanted)
    with pytest.raises((FileError, UnsafeError), match="into="):
        padconvert.load(path)
    with pytest.raises(FileError, match="another architecture"):
        padconvert.load(path, into=seeded(chain))
    with pytest.raises(UsageError, match="--force"):
        padconvert.save(model, path)
    assert padconvert.save(model, path, inputs=images(2), force=True).bytes == path.stat().st_size


def test_a_model_that_was_never_trained_is_stored_once_and_equal(tmp_path: Path) -> None:
    source = seeded(chain)
    model = copy.deepcopy(source)
    plan = padconvert.plan(model, policy(), inputs=images(2), route="data-free")
    padconvert.rewrite_(model, plan)
    padconvert.Partitioner(model, plan).round_(1, [])
    padconvert.save(model, tmp_path / "free.st", inputs=images(2))
    torch.save(source, tmp_path / "source.pt")
    assert (tmp_path / "free.st").stat().st_size < 2 * (tmp_path / "source.pt").stat().st_size
    loaded = padconvert.load(tmp_path / "free.st")
    assert relative(output(loaded), output(source)) <= 1e-10
    assert {layer.num_experts for layer in pad_layers(loaded).values()} == {4}


def test_the_same_steps_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.st", "b.st"):
        padconvert.save(made(defaults__router="mlp")[1], tmp_path / name, inputs=images(2))
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "b.st").read_bytes()


def test_a_probe_is_found_where_the_first_layer_is_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    policy = load_policy(overrides={"rules": [{"name": "0", "convert": True}]})
    padconvert.rewrite_(model, padconvert.plan(model, policy))
    padconvert.save(model, tmp_path / "m.pad.safetensors")
    probe = read_checkpoint(tmp_path / "m.pad.safetensors").manifest.probe
    assert probe is not None
    assert probe.inputs[0].shape[0] == 5
