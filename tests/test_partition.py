"""Scores, counts and rounds of the partition."""

from __future__ import annotations

import copy
import itertools
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from padconvert.errors import PolicyError, UsageError, VerificationError
from padconvert.layers.build import upcycle
from padconvert.layers.pad import PadLayer
from padconvert.partition.evidence import measure
from padconvert.partition.partitioner import Partitioner
from padconvert.partition.ranking import keep_across_layers, keep_in_layer
from padconvert.partition.schedule import count_at, ratio_at
from padconvert.partition.scores import Need, score_named
from padconvert.plan import Plan, make_plan
from padconvert.policy import load_policy
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.walk import walk
from padconvert.words import Granularity, Routing

ALL_SCORES = ("taylor", "fisher", "variance", "snip", "magnitude", "random")


# ---- counts and rankings -----------------------------------------------------------------------------------------


@given(
    ratio=st.decimals(0, 1, places=3),
    rounds=st.integers(1, 8),
    n=st.integers(1, 10_000),
    schedule=st.sampled_from(["exponential", "linear"]),
)
def test_counts_shrink_to_the_exact_one(ratio: Decimal, rounds: int, n: int, schedule: str) -> None:
    counts = [count_at(ratio, rounds, t, schedule, n) for t in range(1, rounds + 1)]
    assert counts[-1] == int(Fraction(ratio) * n + Fraction(1, 2))
    assert all(a >= b for a, b in zip([n, *counts], counts, strict=False))


def test_schedules() -> None:
    assert [float(ratio_at(Decimal("0.25"), 2, t, "exponential")) for t in (1, 2)] == [0.5, 0.25]
    assert [float(ratio_at(Decimal("0.2"), 4, t, "linear")) for t in (1, 2, 3, 4)] == [0.8, 0.6, 0.4, 0.2]
    assert float(ratio_at(Decimal(0), 2, 1, "exponential")) == 0.5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_the_highest_stay_and_ties_go_to_the_lowest_index(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    kept = keep_in_layer(torch.tensor(scores, dtype=torch.float64), count).nonzero()[:, 0].tolist()
    assert kept == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@given(
    lengths=st.lists(st.integers(3, 12), min_size=2, max_size=4),
    share=st.floats(0.2, 0.8),
    seed=st.integers(0, 1000),
)
def test_one_ranking_keeps_exactly_so_many_and_leaves_no_layer_at_an_end(
    lengths: list[int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 5, (n,), generator=generator).double() for n in lengths]
    total = sum(lengths)
    entries = min(max(int(share * total), len(lengths)), total - len(lengths))
    masks = keep_across_layers(scores, [1] * len(lengths), lengths, entries)
    assert sum(int(mask.sum()) for mask in masks) == entries
    assert all(0 < int(mask.sum()) < len(mask) for mask in masks)


def test_filters_of_different_sizes_meet_the_entries_within_one_filter() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (8, 16, 4)]
    sizes = [27, 72, 144]
    for entries in range(300, 1500, 37):
        masks = keep_across_layers(scores, sizes, [8, 16, 4], entries)
        kept = sum(int(mask.sum()) * size for mask, size in zip(masks, sizes, strict=True))
        assert abs(kept - entries) <= max(sizes)


# ---- scores ------------------------------------------------------------------------------------------------------


def trained_layer(granularity: Granularity = Granularity.ELEMENT) -> tuple[PadLayer, Tensor, Tensor]:
    """A small linear layer after a warm-up: 3 clusters of inputs, each with its own target.

    As in a real warm-up it is far from a minimum, where a first-order score would have little left to measure.
    """
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(0, 3, (240,), generator=generator)
    x = torch.randn(240, 6, generator=generator, dtype=torch.float64) + 3 * torch.eye(3, 6).double()[cluster]
    target = torch.einsum("noi,ni->no", torch.randn(3, 4, 6, generator=generator).double()[cluster], x)
    torch.manual_seed(0)
    static = nn.Linear(6, 4, dtype=torch.float64)
    pad = upcycle(
        static,
        num_experts=3,
        granularity=granularity,
        router="linear",
        routing=Routing.TOKEN,
        learned_scales=True,
        generator=generator,
    )
    pad.router.initialise_(x, generator)  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(pad.parameters(), lr=0.005)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(pad, x, target).backward()
        optimizer.step()
    return pad, x, target


def loss_of(pad: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(pad(x), target)


def scores_of(pad: PadLayer, x: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    score = score_named(name)
    pieces = x.split(1) if score.NEEDS is Need.SAMPLE_GRADIENTS else x.split(24)
    goals = target.split(len(pieces[0]))
    losses = [lambda a=a, b=b: loss_of(pad, a, b) for a, b in zip(pieces, goals, strict=True)]
    scores, mean = measure(pad, {"": pad}, score, losses, torch.Generator().manual_seed(0))
    return scores["", "weight"], mean[""]


def true_changes(pad: PadLayer, x: Tensor, target: Tensor, mean: Tensor) -> list[float]:
    """The loss change of turning each single unit static."""
    with torch.no_grad():
        before = loss_of(pad, x, target)
        changes = []
        for unit in range(pad.view("weight").units):
            one = copy.deepcopy(pad)
            keep = torch.arange(pad.view("weight").units) != unit
            for part in pad.parts if pad.granularity is Granularity.CHANNEL else ("weight",):
                one.partition_(part, keep, mean)
            changes.append(float((loss_of(one, x, target) - before).abs()))
    return changes


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
def test_taylor_ranks_as_the_true_loss_change(granularity: Granularity) -> None:
    pad, x, target = trained_layer(granularity)
    score, mean = scores_of(pad, x, target, "taylor")
    changes = true_changes(pad, x, target, mean)
    if granularity is Granularity.ELEMENT:
        assert spearmanr(score, changes).statistic >= 0.97
        assert spearmanr(scores_of(pad, x, target, "snip")[0], changes).statistic < 0.5
        assert spearmanr(scores_of(pad, x, target, "random")[0], changes).statistic < 0.4
    else:
        assert int(score.argmax()) == int(torch.tensor(changes).argmax())


def test_taylor_and_fisher_are_their_formulas() -> None:
    """Against ∂L/∂W(b) of every sample, taken from the weights themselves rather than from the experts."""
    pad, x, target = trained_layer()
    mean = scores_of(pad, x, target, "taylor")[1]
    assert pad.weight_dynamic is not None
    experts = pad.expert_tensors("weight").detach()
    routing = pad.route(x).detach()
    static_change = torch.einsum("nk,koi->noi", routing, experts) - torch.einsum("k,koi->oi", mean, experts)
    weight_NOI = torch.einsum("nk,koi->noi", routing, experts).requires_grad_()
    bias = torch.einsum("nk,ko->no", routing, pad.expert_tensors("bias").detach())
    out = torch.einsum("noi,ni->no", weight_NOI, x) + bias
    per_sample = (out - target).square().mean(1)
    gradient_NOI = torch.autograd.grad(per_sample.sum(), weight_NOI)[0]
    change = (gradient_NOI * static_change).flatten(1)
    torch.testing.assert_close(scores_of(pad, x, target, "taylor")[0], (change.sum(0) / len(x)).abs())
    torch.testing.assert_close(scores_of(pad, x, target, "fisher")[0], change.square().mean(0))


def test_variance_magnitude_and_random() -> None:
    pad, x, target = trained_layer()
    score, mean = scores_of(pad, x, target, "variance")
    experts = pad.expert_tensors("weight").detach().flatten(1)
    centre = (mean[:, None] * experts).sum(0)
    torch.testing.assert_close(score, (mean[:, None] * (experts - centre).square()).sum(0))
    torch.testing.assert_close(scores_of(pad, x, target, "magnitude")[0], centre.abs())
    drawn = scores_of(pad, x, target, "random")[0]
    assert torch.equal(drawn, scores_of(pad, x, target, "random")[0])
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1


def test_scoring_leaves_the_layer_as_it_was() -> None:
    pad, x, target = trained_layer()
    pad.train()
    before = copy.deepcopy(pad.state_dict())
    pad.requires_grad_(False)
    for name in ALL_SCORES:
        scores_of(pad, x, target, name)
    assert pad.training
    assert not any(p.requires_grad for p in pad.parameters())
    assert all(torch.equal(value, before[key]) for key, value in pad.state_dict().items())


def test_a_score_that_is_not_finite_names_its_layer() -> None:
    pad, x, target = trained_layer()
    with torch.no_grad():
        next(p for n, p in pad.named_parameters() if n == "weight_dynamic")[0, 0] = torch.inf
    with pytest.raises(VerificationError, match=r"layer ''.*not finite"):
        scores_of(pad, x, target, "taylor")


# ---- rounds ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.a = nn.Conv2d(6, 8, 3)
        self.b = nn.Conv2d(8, 10, 3, bias=False)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(torch.relu(self.stem(x))))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def planned(model: nn.Module, **settings: object) -> Plan:
    overrides = {"partition.rounds": 3, "defaults.dynamic_ratio": "0.3"} | settings
    policy = load_policy(None, None, overrides).policy
    tensors = {name: (tuple(t.shape), t.element_size()) for name, t in model.state_dict().items()}
    return make_plan(walk(model), policy, route="trained", seed=0, tensors=tensors)


def run_rounds(model: nn.Module, plan: Plan) -> tuple[Partitioner, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 12, 12)
    rewrite_(model, plan)
    with torch.no_grad():
        for layer in pad_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    partitioner = Partitioner(model, plan)
    losses = [lambda s=s: model(s).square().mean() for s in x.split(1)]
    masks = []
    for t in range(1, partitioner.rounds + 1):
        partitioner.round_(t, losses)
        masks.append({name: layer.units("weight").mask() for name, layer in pad_layers(model).items()})
    return partitioner, masks


@pytest.mark.parametrize("score", ALL_SCORES)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_rounds_shrink_to_the_plans_counts(score: str, scope: str, granularity: str) -> None:
    torch.manual_seed(1)
    model = Net()
    settings = {"partition.score": score, "partition.scope": scope, "defaults.granularity": granularity}
    plan = planned(model, **settings)
    _, masks = run_rounds(model, plan)
    for before, after in itertools.pairwise(masks):
        assert all(bool((after[name] <= before[name]).all()) for name in before)
    entries = {"a": 8 * 6 * 9, "b": 10 * 8 * 9}
    size = {"a": 1, "b": 1} if granularity == "element" else {"a": 54, "b": 72}
    found = {name: int(mask.sum()) * size[name] for name, mask in masks[-1].items()}
    if scope == "layer":
        units = {name: entries[name] // size[name] for name in entries}
        assert found == {name: int(0.3 * units[name] + 0.5) * size[name] for name in units}
    else:
        wanted = int(0.3 * sum(entries.values()) + 0.5)
        assert abs(sum(found.values()) - wanted) <= (0 if granularity == "element" else 72)
    layer = pad_layers(model)["a"]
    bias = len(layer.units("bias").dynamic)
    assert bias == (int(0.3 * 8 + 0.5) if granularity == "element" else int(masks[-1]["a"].sum()))


def test_equal_experts_end_the_run() -> None:
    model = Net()
    plan = planned(model)
    rewrite_(model, plan)
    x = torch.randn(8, 1, 12, 12)
    with pytest.raises(VerificationError, match="experts are still equal"):
        Partitioner(model, plan).round_(1, [lambda: model(x).square().mean()])


def test_a_network_whose_loss_depends_on_nothing_ends_the_run() -> None:
    """As after a step that was far too large, when every unit of a layer is dead."""
    model = Net()
    plan = planned(model)
    rewrite_(model, plan)
    x = torch.randn(8, 1, 12, 12)
    for layer in pad_layers(model).values():
        assert layer.weight_dynamic is not None
        torch.nn.init.normal_(layer.weight_dynamic)
    with pytest.raises(VerificationError, match=r"the experts differ.*lower train\.lr or train\.expert_lr_scale"):
        Partitioner(model, plan).round_(1, [lambda: model(x).square().mean() * 0])


def test_a_random_partition_differs_with_the_seed_only() -> None:
    def final(seed: int) -> Tensor:
        torch.manual_seed(1)
        model = Net()
        plan = planned(model, **{"partition.score": "random"})
        object.__setattr__(plan, "seed", seed)
        return run_rounds(model, plan)[1][-1]["b"]

    assert torch.equal(final(3), final(3))
    assert not torch.equal(final(3), final(4))


def test_rounds_come_in_order_once_and_with_data() -> None:
    torch.manual_seed(1)
    model = Net()
    partitioner, masks = run_rounds(model, planned(model))
    with pytest.raises(UsageError, match=r"round_\(4\): all rounds are done"):
        partitioner.round_(4, [])
    other = Net()
    plan = planned(other)
    rewrite_(other, plan)
    fresh = Partitioner(other, plan)
    for t in (0, 2, 99):
        with pytest.raises(UsageError, match=rf"round_\({t}\): round 1 of 3 is due"):
            fresh.round_(t, [lambda: other(torch.randn(1, 1, 12, 12)).sum()])
    with pytest.raises(UsageError, match="needs losses of at least one micro-batch"):
        fresh.round_(1, [])
    assert all(len(layer.units("weight").static) == 0 for layer in pad_layers(other).values())
    assert masks


def test_a_plan_of_another_model_is_refused() -> None:
    model = Net()
    plan = planned(model)
    with pytest.raises(PolicyError, match="'a': the model has no such layer"):
        rewrite_(nn.Sequential(nn.Linear(3, 3)), plan)
    other = Net()
    other.a = nn.Conv2d(6, 8, 5)
    with pytest.raises(PolicyError, match=r"'a': the model has another one there \(Conv2d\)"):
        rewrite_(other, plan)
    rewrite_(model, plan)
    with pytest.raises(PolicyError, match="'a' is dynamic already"):
        rewrite_(model, plan)


def test_the_fully_dynamic_neighbour_is_there_at_every_ratio() -> None:
    full = {ratio: planned(Net(), **{"defaults.dynamic_ratio": ratio}).cost for ratio in ("0", "0.3", "1")}
    assert len({cost.params_fully_dynamic for cost in full.values()}) == 1
    assert len({cost.bytes_fully_dynamic for cost in full.values()}) == 1
    assert full["1"].params_output == full["1"].params_fully_dynamic
    assert full["0"].params_output == full["0"].params_source
