"""Plans of feed-forward blocks: decided, counted and ranked as a whole; what they cost against a count by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_cases import block as block_entries
from checkpoint_cases import manifest
from padconvert.checkpoint.layout import expected_tensors
from padconvert.checkpoint.manifest import LayerEntry
from padconvert.errors import NothingEligibleError, PolicyError
from padconvert.layers.facts import LayerFacts
from padconvert.load.opened import rules_of
from padconvert.plan import (
    ITEMSIZE,
    Plan,
    Route,
    check_plan_fits,
    exact_count,
    explain_layer,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from padconvert.plan.memory import least_file_bytes
from padconvert.policy import Resolved, load_policy, router_names
from padconvert.walk.info import LayerInfo, Walk
from padconvert.words import Granularity, Place, Reason, Role, Routing, Verdict
from test_plan import GATED, ROUTES, block, by_name, layer, planned, tensors

PLAIN = Walk(block("", 4, 6), "forward")
TWO = Walk((*block("a.", 4, 6, gated=True), *block("b.", 4, 10)), "forward")
STATIC_LONE = ("lone", (Verdict.STATIC, Reason.LINEAR_STATIC))


def counts(plan: Plan) -> dict[str, tuple[int, int | None, int | None]]:
    return {e.info.name: (e.n_units, e.n_dynamic, e.n_bias_dynamic) for e in plan.converted}


# ---- who is converted ------------------------------------------------------------------------------------------


def test_blocks_are_trained_at_a_lower_rate() -> None:
    assert planned(GATED).policy.train.lr == 2e-5
    assert planned(GATED, train__optimizer="sgd").policy.train.lr == 0.01


def test_a_proven_block_is_converted_as_a_whole_and_lone_layers_stay() -> None:
    plan = planned(GATED)
    whole = (Verdict.CONVERT, Reason.POLICY_DEFAULT)
    assert by_name(plan) == dict([("up", whole), ("gate", whole), ("down", whole), STATIC_LONE])
    (choice,) = {entry.choice for entry in plan.converted}
    assert choice is not None
    assert (choice.group, choice.num_experts, choice.top_k, choice.dynamic_ratio) == ("up", 8, 2, Decimal("0.5"))
    assert [(e.place, e.has_router) for e in plan.layers] == [
        (Place.FIRST, True),
        (Place.PEER, False),
        (Place.LAST, False),
        (Place.ALONE, False),
    ]
    asked = planned(GATED, rules=[{"name": "lone", "top_k": 1}])
    lone = asked.layers[3].choice
    assert lone is not None
    assert (lone.group, lone.num_experts, lone.top_k) == ("", 4, 1)  # of 'defaults', as the rule changes it


def test_without_a_forward_the_message_says_why_no_block_is_proven() -> None:
    unproven = tuple(replace(info, group="", place=Place.ALONE) for info in block("", 4, 6))
    failed = Walk(unproven, "tree", ("a forward on a guess fails: KeyError: 'table'",))
    with pytest.raises(NothingEligibleError, match=r"No block can be proven without .*: KeyError: 'table'\. With 'lev"):
        planned(failed)
    with pytest.raises(NothingEligibleError) as caught:
        planned(replace(failed, method="forward"))
    assert "KeyError" not in str(caught.value)


def test_neuron_for_all_layers_names_the_key_for_blocks_alone() -> None:
    both = Walk((layer("conv", (8, 4, 2, 2)), *PLAIN.layers), "forward")
    with pytest.raises(PolicyError, match=r"ask for it in the blocks alone with --set ffn\.granularity=neuron \(layer"):
        planned(both, defaults__granularity="neuron")
    assert {e.choice.granularity for e in planned(both, ffn__granularity="neuron").layers if e.choice} == {
        Granularity.ELEMENT,
        Granularity.NEURON,
    }


def test_at_level_linear_each_layer_is_by_itself() -> None:
    plan = planned(GATED, ffn__level="linear", rules=[{"name": "gate", "convert": False}])
    assert [(e.info.name, e.place, e.has_router) for e in plan.converted] == [
        ("up", Place.ALONE, True),
        ("down", Place.ALONE, True),
    ]
    assert {(e.choice.group, e.choice.top_k, e.choice.num_experts) for e in plan.converted if e.choice} == {("", 2, 8)}
    assert by_name(plan)["lone"] == STATIC_LONE[1]
    by_rule = planned(GATED, rules=[{"role": "ffn", "level": "linear"}])
    assert {e.choice.group for e in by_rule.converted if e.choice} == {""}


def test_a_block_that_is_not_proven_needs_level_linear() -> None:
    walk = Walk((layer("up", (6, 4), Role.FFN), layer("down", (4, 6), Role.FFN)), "tree")
    with pytest.raises(
        NothingEligibleError, match=r"2 × ffn_not_proven .* With 'level: linear' \(--set ffn\.level=linear"
    ):
        planned(walk)
    half = planned(walk, rules=[{"name": "up", "level": "linear"}])
    assert by_name(half) == {
        "up": (Verdict.CONVERT, Reason.POLICY_RULE),
        "down": (Verdict.INELIGIBLE, Reason.FFN_NOT_PROVEN),
    }
    assert "'level: linear' converts it by itself (ffn_not_proven)" in explain_layer(half, "down")
    assert by_name(planned(walk, ffn__convert=False, rules=[{"name": "up", "level": "linear"}]))["down"] == (
        Verdict.STATIC,
        Reason.POLICY_DEFAULT,
    )


def test_a_block_with_a_layer_that_cannot_be_converted_is_left_alone() -> None:
    up, down = block("", 4, 6)
    tied = replace(down, eligible=False, reason=Reason.TIED_WEIGHT)
    plan = planned(Walk((up, tied, *block("b.", 4, 6)), "forward"))
    assert by_name(plan)["up"] == (Verdict.INELIGIBLE, Reason.FFN_NOT_PROVEN)
    assert by_name(plan)["down"] == (Verdict.INELIGIBLE, Reason.TIED_WEIGHT)
    assert [e.info.name for e in plan.converted] == ["b.up", "b.down"]
    assert plan.notes == ("the feed-forward block up is left alone: down is tied_weight",)
    head = planned(Walk((up, replace(down, role=Role.HEAD), *block("b.", 4, 6)), "forward"))
    assert by_name(head)["up"] == by_name(head)["down"] == (Verdict.STATIC, Reason.HEAD_STATIC)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "gate", "convert": False},
        {"name": "gate", "num_experts": 4},
        {"name": "gate", "top_k": 1},
        {"name": "gate", "level": "linear"},
        {"name": "gate", "granularity": "channel"},
        {"name": "gate", "routing": "sequence"},
        {"name": "gate", "router": "mlp"},
    ],
)
def test_a_rule_for_a_part_of_a_block_is_refused(rule: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match="the feed-forward block up is converted as a whole") as caught:
        planned(GATED, rules=[rule])
    assert ": rules[0] decides over gate; 'ffn' decides over up, down: the feed-" in str(caught.value)
    assert str(caught.value).endswith("or convert each by itself with 'level: linear'")


def test_a_ratio_may_differ_within_a_block_but_not_that_of_its_hidden_units() -> None:
    rule = {"name": "gate", "dynamic_ratio": 0.25}
    plan = planned(GATED, partition__scope="layer", rules=[rule])
    assert counts(plan) == {"up": (24, 12, 3), "gate": (24, 6, 2), "down": (24, 12, 2)}
    with pytest.raises(PolicyError, match="the feed-forward block up is converted as a whole"):
        planned(GATED, ffn__granularity="neuron", rules=[rule])
    same = planned(GATED, rules=[{"name": "gate", "dynamic_ratio": 0.5}])
    assert {e.choice for e in same.converted} == {e.choice for e in planned(GATED).converted}


# ---- what cannot be --------------------------------------------------------------------------------------------


def test_a_causal_layer_is_not_routed_by_its_sequence() -> None:
    causal = Walk(block("h.0.", 4, 6, causal=True), "forward")
    said = r"ffn\.routing: 'sequence' cannot be: the layer is causal.*use 'token' \(layer h\.0\.up\)"
    with pytest.raises(PolicyError, match=said):
        planned(causal, defaults__routing="sequence")
    with pytest.raises(PolicyError, match=r"rules\[0\]\.routing: 'sequence' cannot be"):
        planned(causal, rules=[{"role": "ffn", "level": "linear", "routing": "sequence"}])
    assert len(planned(causal).converted) == 2
    assert len(planned(Walk(block("", 4, 6, causal=False), "forward"), ffn__routing="sequence").converted) == 2


def test_a_block_mixes_all_experts_for_whole_sequences_only() -> None:
    with pytest.raises(PolicyError, match=r"ffn\.top_k: 0 cannot be .*top_k ≥ 1, or routing: sequence \(layer up\)"):
        planned(PLAIN, ffn__top_k=0)
    soft = planned(PLAIN, ffn__top_k=0, ffn__routing="sequence")
    assert {(e.choice.top_k, e.choice.routing) for e in soft.converted if e.choice} == {(0, Routing.SEQUENCE)}
    assert len(planned(PLAIN, ffn__top_k=0, ffn__level="linear").converted) == 2


def test_no_more_experts_are_computed_than_there_are() -> None:
    with pytest.raises(PolicyError, match=r"ffn\.top_k: 4 is more than there are experts: 'num_experts' is 3"):
        planned(PLAIN, ffn__top_k=4, rules=[{"role": "ffn", "num_experts": 3}])
    conv = planned(Walk((layer("c", (4, 4, 3, 3)),), "tree"), defaults__top_k=4)
    assert [e.choice.top_k for e in conv.converted if e.choice] == [0]
    assert "top_k: 0  # convolutions always mix all experts" in explain_layer(conv, "c")


# ---- counts and costs, by hand ---------------------------------------------------------------------------------


def test_counts_of_a_gated_block() -> None:
    def of(granularity: str, ratio: str) -> dict[str, tuple[int, int | None, int | None]]:
        settings: dict[str, Any] = {"ffn__granularity": granularity, "ffn__dynamic_ratio": ratio}
        return counts(planned(GATED, partition__scope="layer", **settings))

    assert of("element", "0.25") == {"up": (24, 6, 2), "gate": (24, 6, 2), "down": (24, 6, 1)}
    assert of("channel", "0.25") == {"up": (6, 2, 2), "gate": (6, 2, 2), "down": (4, 1, 1)}
    assert of("neuron", "0.25") == {"up": (6, 2, 2), "gate": (6, 2, 2), "down": (6, 2, 0)}
    # 0.1 · 6 rounds to 1 row, 0.1 · 4 to none: the block is converted as a whole all the same
    assert of("channel", "0.1") == {"up": (6, 1, 1), "gate": (6, 1, 1), "down": (4, 0, 0)}
    assert of("neuron", "0.08") == {}


def test_a_block_that_keeps_no_unit_becomes_static() -> None:
    plan = planned(GATED, ffn__dynamic_ratio=0)
    for name in ("up", "gate", "down"):
        assert by_name(plan)[name] == (Verdict.STATIC, Reason.RATIO_ROUNDS_TO_ZERO)
    assert plan.cost.bytes_output == plan.cost.bytes_source


#: of GATED: numbers of the source (7 are a buffer's), those of the block, and of its linear router over d = 4
SOURCE = 7 + 3 * 24 + 6 + 6 + 4 + 64 + 8
BLOCK, ROUTER = 3 * 24 + 6 + 6 + 4, 8 * 4 + 8


@pytest.mark.parametrize(
    ("granularity", "dynamic", "masks"),
    [
        # 12 of 24 entries in each, 3 of 6, 3 of 6 and 2 of 4 biases; a bitmask for each
        ("element", 3 * 12 + 3 + 3 + 2, 3 * 3 + 3 * 1),
        # 3 rows of up and gate (4 wide), 2 of down (6 wide), with their biases; an index for each
        ("channel", 2 * (3 * 4 + 3) + 2 * 6 + 2, 4 * (3 + 3 + 2)),
        # 3 hidden units: rows of up and gate with their biases, columns of down without; one index
        ("neuron", 2 * (3 * 4 + 3) + 3 * 4, 4 * 3),
    ],
)
def test_bytes_and_active_parameters_of_a_gated_block(granularity: str, dynamic: int, masks: int) -> None:
    cost = planned(GATED, partition__scope="layer", ffn__granularity=granularity).cost
    assert cost.params_source == SOURCE
    assert cost.params_output == SOURCE + 7 * dynamic + ROUTER
    assert cost.params_active_output == SOURCE + dynamic + ROUTER  # top-2: one further copy
    assert (cost.bytes_values, cost.bytes_masks) == (4 * (BLOCK + 7 * dynamic), masks)
    assert (cost.bytes_router, cost.bytes_output) == (4 * ROUTER, 4 * (SOURCE + 7 * dynamic + ROUTER) + masks)
    whole = BLOCK - 4 if granularity == "neuron" else BLOCK  # down's bias is no hidden unit's
    assert cost.params_fully_dynamic == SOURCE + 7 * whole + ROUTER
    assert cost.params_active_fully_dynamic == SOURCE + whole + ROUTER
    assert cost.bytes_fully_dynamic == 4 * cost.params_fully_dynamic


def test_routers_and_active_parameters_at_level_linear() -> None:
    cost = planned(GATED, partition__scope="layer", ffn__level="linear", ffn__top_k=3).cost
    routers = 2 * (8 * 4 + 8) + (8 * 6 + 8)
    assert cost.bytes_router == 4 * routers
    assert cost.params_active_output == SOURCE + 2 * (3 * 12 + 3 + 3 + 2) + routers


def test_what_is_mixed_or_equal_is_active_once() -> None:
    soft = planned(GATED, ffn__top_k=0, ffn__routing="sequence").cost
    assert soft.params_active_output == soft.params_active_fully_dynamic == SOURCE + ROUTER
    equal = planned(GATED, "data-free").cost
    assert equal.params_active_output == equal.params_output == SOURCE + ROUTER


# ---- pools -----------------------------------------------------------------------------------------------------


def test_hidden_units_of_blocks_are_ranked_together() -> None:
    plan = planned(TWO, ffn__granularity="neuron")
    (pool,) = plan.pools
    assert pool.names == ("a.up", "a.gate", "a.down", "b.up", "b.down")
    assert (pool.n_entries, pool.target) == (3 * 24 + 2 * 40, 76)
    assert counts(plan) == {
        "a.up": (6, None, None),
        "a.gate": (6, None, None),
        "a.down": (6, None, 0),
        "b.up": (10, None, None),
        "b.down": (10, None, 0),
    }
    # entries exactly, biases and indices as expected: 3 of 6 and 5 of 10 units
    assert plan.cost.bytes_masks == 4 * (3 + 5)
    assert plan.cost.bytes_values == 4 * (152 + 30 + 7 * (76 + 3 + 3 + 5))
    assert least_file_bytes(plan) == plan.cost.bytes_source + plan.cost.bytes_router + (76 - 3 * 4) * 7 * 4
    assert "decided by the ranking over 5 layers, which keep 76 of 152" in explain_layer(plan, "b.down")


def test_a_block_alone_or_of_several_dtypes_counts_for_itself() -> None:
    alone = planned(GATED, ffn__granularity="neuron")
    assert (alone.pools, counts(alone)["down"]) == ((), (6, 3, 0))
    up, down = block("b.", 4, 10)
    mixed = planned(
        Walk((*block("a.", 4, 6), up, replace(down, dtype="float16")), "forward"), ffn__granularity="neuron"
    )
    assert (mixed.pools, counts(mixed)["b.up"]) == ((), (10, 5, 5))
    element = planned(GATED)
    (pool,) = element.pools
    assert (pool.names, pool.n_entries, pool.target) == (("up", "gate", "down"), 72, 36)


def test_layers_of_another_top_k_are_ranked_apart() -> None:
    plan = planned(TWO, rules=[{"name": "b.*", "top_k": 1}])
    assert [pool.names for pool in plan.pools] == [("a.up", "a.gate", "a.down"), ("b.up", "b.down")]


# ---- laws ------------------------------------------------------------------------------------------------------


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    infos: list[LayerInfo] = []
    for index in range(draw(st.integers(1, 3))):
        d, h = draw(st.integers(1, 4)), draw(st.integers(1, 6))
        dtype, bias = draw(st.sampled_from(["float32", "float16"])), draw(st.booleans())
        infos += block(f"{index}.", d, h, gated=draw(st.booleans()), dtype=dtype, bias=bias)
    if draw(st.booleans()):
        infos.insert(draw(st.integers(0, len(infos))), layer("lone", (3, 5), Role.LINEAR))
    return Walk(tuple(infos), "forward")


@st.composite
def policies(draw: st.DrawFn) -> Resolved:
    overrides: dict[str, object] = {
        "ffn.dynamic_ratio": draw(st.decimals(0, 1, places=3)),
        "ffn.num_experts": draw(st.integers(3, 5)),
        "ffn.granularity": draw(st.sampled_from(["element", "channel", "neuron"])),
        "ffn.router": draw(st.sampled_from(router_names())),
        "ffn.top_k": draw(st.integers(0, 3)),
        "ffn.routing": "sequence",
        "partition.scope": draw(st.sampled_from(["global", "layer"])),
        "rules": draw(st.sampled_from([[], [{"name": "1.*", "dynamic_ratio": "0.5", "optional": True}]])),
    }
    return load_policy(overrides=overrides)


def settled(plan: Plan) -> dict[str, int]:
    """Numbers of dynamic units that the plan allows, its pools filled from the front; those of a block alike."""
    found = {entry.info.name: entry.n_dynamic for entry in plan.converted if entry.n_dynamic is not None}
    entries = {entry.info.name: entry for entry in plan.converted}
    for pool in plan.pools:
        items: dict[str, list[str]] = {}
        for name in pool.names:
            choice = entries[name].choice
            assert choice is not None
            items.setdefault(choice.group if choice.granularity is Granularity.NEURON else name, []).append(name)
        sizes = {
            k: sum(math.prod(entries[n].info.weight_shape) // entries[n].n_units for n in v) for k, v in items.items()
        }
        left = pool.target - sum(sizes.values())
        for key, names in items.items():
            more = min(entries[names[0]].n_units - 2, left // sizes[key])
            found |= dict.fromkeys(names, 1 + more)
            left -= more * sizes[key]
        assert left >= 0
    return found


def entry_of(plan: Plan, name: str, n_dynamic: int) -> LayerEntry:
    """The manifest's entry of a planned layer, with the counts that a partition arrived at."""
    planned_layer = next(entry for entry in plan.converted if entry.info.name == name)
    info, choice = planned_layer.info, planned_layer.choice
    assert choice is not None
    by_entry = choice.granularity is Granularity.ELEMENT
    by_row = 0 if choice.granularity is Granularity.NEURON and info.place is Place.LAST else n_dynamic
    n_bias = exact_count(choice.dynamic_ratio, info.weight_shape[0]) if by_entry else by_row
    facts = LayerFacts(
        info.kind, choice.granularity, choice.num_experts, info.weight_shape, info.dtype, info.has_bias, n_dynamic,
        n_bias if info.has_bias else 0, choice.router, choice.routing, top_k=choice.top_k, group=choice.group,
        place=planned_layer.place,
    )  # fmt: skip
    return LayerEntry(name, (), plan.route == "data-free", facts)


@given(walks(), policies(), ROUTES)
def test_a_plan_of_blocks_is_a_function_and_predicts_what_is_stored(
    walk: Walk, resolved: Resolved, route: Route
) -> None:
    plan = make_plan(walk, resolved, route=route, seed=0, tensors=tensors(walk))
    assert plan == make_plan(walk, resolved, route=route, seed=0, tensors=tensors(walk))
    assert plan_from_json(plan_to_json(plan)) == plan
    check_plan_fits(plan, walk, None)
    blocks: dict[str, list[int | None]] = {}
    for entry in plan.converted:
        blocks.setdefault(entry.info.group, []).append(entry.n_dynamic)
    together = {info.group: sum(other.group == info.group for other in walk.layers) for info in walk.layers}
    assert all(len(members) == together[group] for group, members in blocks.items())
    if plan.pools and resolved.policy.ffn.granularity != "element":
        return
    values = masks = routers = 0
    for name, n_dynamic in settled(plan).items():
        for tensor, (dtype, shape) in expected_tensors(entry_of(plan, name, n_dynamic)).items():
            size = math.prod(shape)
            if ".router." in tensor:
                routers += 4 * size
            elif tensor.endswith(("_index", "_bitmask")):
                masks += size * (4 if tensor.endswith("_index") else 1)
            else:
                values += size * ITEMSIZE[dtype]
    cost = plan.cost
    assert (cost.bytes_values, cost.bytes_masks, cost.bytes_router) == (values, masks, routers)
    assert cost.params_source <= cost.params_active_output <= cost.params_output


@given(walks(), policies())
def test_pools_take_blocks_whole(walk: Walk, resolved: Resolved) -> None:
    plan = make_plan(walk, resolved, route="trained", seed=0, tensors=tensors(walk))
    entries = {entry.info.name: entry for entry in plan.converted}
    for pool in plan.pools:
        assert pool.n_entries == sum(math.prod(entries[name].info.weight_shape) for name in pool.names)
        assert pool.target == math.floor(Fraction(pool.ratio) * pool.n_entries + Fraction(1, 2))
        if entries[pool.names[0]].choice and resolved.policy.ffn.granularity == "neuron":
            blocks = {entries[name].info.group for name in pool.names}
            assert len(blocks) >= 2
            assert set(pool.names) == {e.info.name for e in plan.converted if e.info.group in blocks}
    assert min(settled(plan).values(), default=0) >= 0


@given(walks(), policies())
def test_fully_dynamic_is_the_same_plan_of_blocks_at_ratio_one(walk: Walk, resolved: Resolved) -> None:
    plan = make_plan(walk, resolved, route="trained", seed=0, tensors=tensors(walk))
    ffn = resolved.policy.ffn.model_copy(update={"dynamic_ratio": Decimal(1)})
    full_policy = resolved.policy.model_copy(update={"ffn": ffn, "rules": ()})
    full = make_plan(walk, full_policy, route="trained", seed=0, tensors=tensors(walk)).cost
    assert plan.cost.bytes_fully_dynamic == full.bytes_output
    assert plan.cost.params_fully_dynamic == full.params_output
    assert plan.cost.params_active_fully_dynamic == full.params_active_output


# ---- the file, and words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("layers", 1, "choice", "top_k"), 1, "feed-forward block up: its layers are converted in one way"),
        (("layers", 1, "n_dynamic"), 2, "feed-forward block up: a hidden unit is dynamic in all of its layers"),
        (("layers", 1, "info", "place"), "first", "feed-forward block up: a block has one first and one last layer"),
        (("layers", 1, "info", "weight_shape"), [6, 5], r"shapes \[\(6, 4\), \(6, 5\)\] and \(4, 6\) are no block's"),
        (("layers", 0, "info", "name"), "other", "feed-forward block up: a block is named for its first layer"),
        (("layers", 2, "choice", "group"), "lone", "layer down: it belongs to no feed-forward block lone"),
        (("layers", 0, "choice", "top_k"), 9, "layer up: top_k 9 is more than there are experts"),
        (("layers", 0, "choice", "top_k"), 0, "layer up: top_k 0 cannot be with routing 'token'"),
        (("layers", 0, "choice", "routing"), "map", "layer up: a linear layer is not routed by map"),
        (("layers", 0, "choice", "group"), "", "layer up: granularity 'neuron' is for the hidden units"),
    ],
)
def test_a_plan_of_blocks_is_read_strictly(path: tuple[str | int, ...], value: object, expected: str) -> None:
    data = json.loads(plan_to_json(planned(GATED, ffn__granularity="neuron")))
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(PolicyError, match=expected):
        plan_from_json(json.dumps(data))


def test_a_plan_of_blocks_must_fit_its_source() -> None:
    plan = planned(GATED, ffn__routing="sequence")
    check_plan_fits(plan, GATED, None)
    for change in ({"group": "", "place": Place.ALONE}, {"place": Place.PEER}):
        other = Walk((replace(GATED.layers[0], **change), *GATED.layers[1:]), "forward")
        with pytest.raises(PolicyError, match="layer up is not what the plan was made for"):
            check_plan_fits(plan, other, None)
    causal = Walk(tuple(replace(info, causal=True) for info in GATED.layers), "forward")
    with pytest.raises(PolicyError, match="layer up is causal, and the plan routes it by its sequence"):
        check_plan_fits(plan, causal, None)
    check_plan_fits(planned(GATED), causal, None)


def test_explain_says_what_of_a_block_was_said_where() -> None:
    plan = planned(GATED, defaults__dynamic_ratio=0.25, rules=[{"role": "ffn", "top_k": 1, "optional": True}])
    text = explain_layer(plan, "gate")
    assert "gate: Linear, role ffn, 24 weight entries, peer of the feed-forward block up" in text
    assert "dynamic_ratio: 0.25  # ffn.dynamic_ratio, option --set defaults.dynamic_ratio=0.25" in text
    assert "num_experts: 8  # ffn.num_experts, preset paper" in text
    assert "top_k: 1  # rules[0].top_k, " in text
    assert "level: ffn  # ffn.level, preset paper" in text
    assert "static: beside feed-forward blocks, other linear layers stay static" in explain_layer(plan, "lone")


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("gated", [False, True])
def test_the_rules_of_an_artefact_plan_the_blocks_it_has(granularity: Granularity, gated: bool) -> None:
    layers = block_entries(granularity=granularity, gated=gated, d=3, h=5)
    infos = block("", 3, 5, gated=gated)
    rules = rules_of(manifest(*layers))
    resolved = load_policy(overrides={"partition.scope": "layer"})
    policy = resolved.policy.model_copy(update={"rules": rules})
    plan = make_plan(Walk(infos, "forward"), policy, route="trained", seed=0, tensors=tensors(Walk(infos, "forward")))
    made = {e.info.name: (e.n_dynamic, e.choice.top_k, e.place) for e in plan.converted if e.choice}
    assert made == {layer.name: (2, 2, layer.facts.place) for layer in layers}
