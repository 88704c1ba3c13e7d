"""The plan: who is converted and why, exact counts, and predicted bytes against an independent count."""

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

from padconvert.errors import NothingEligibleError, PolicyError, UsageError
from padconvert.layers.routers import tensor_shapes
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
from padconvert.policy import Resolved, load_policy, router_names
from padconvert.walk.info import LayerInfo, Walk
from padconvert.words import Granularity, Kind, Place, Reason, Role, Routing, Verdict


def layer(
    name: str,
    shape: tuple[int, ...],
    role: Role = Role.CONV,
    *,
    bias: bool = True,
    groups: int = 1,
    reason: Reason = Reason.ELIGIBLE,
    aliases: tuple[str, ...] = (),
    dtype: str = "float32",
    group: str = "",
    place: Place = Place.ALONE,
    causal: bool | None = None,
) -> LayerInfo:
    kind = {2: Kind.LINEAR, 3: Kind.CONV1D, 4: Kind.CONV2D, 5: Kind.CONV3D}[len(shape)]
    eligible = reason is Reason.ELIGIBLE
    type_ = {Kind.LINEAR: "Linear", Kind.CONV1D: "Conv1d", Kind.CONV2D: "Conv2d"}.get(kind, "Conv3d")
    block = {"group": group, "place": place, "causal": causal}
    return LayerInfo(name, aliases, type_, kind, role, eligible, reason, shape, bias, groups, dtype, **block)  # type: ignore[arg-type]


def block(prefix: str, d: int, h: int, *, gated: bool = False, **changed: Any) -> tuple[LayerInfo, ...]:
    """A proven feed-forward block d → h → d, named for its first layer: up, in some gate, down."""
    first = f"{prefix}up"
    members = [(first, (h, d), Place.FIRST), (f"{prefix}down", (d, h), Place.LAST)]
    members[1:1] = [(f"{prefix}gate", (h, d), Place.PEER)] if gated else []
    return tuple(layer(n, shape, Role.FFN, group=first, place=place, **changed) for n, shape, place in members)


GATED = Walk((*block("", 4, 6, gated=True), layer("lone", (8, 8), Role.LINEAR)), "forward")


def tensors(walk: Walk) -> dict[str, tuple[tuple[int, ...], int]]:
    """The source's tensors: weights, biases, and one buffer that no layer owns."""
    found: dict[str, tuple[tuple[int, ...], int]] = {"running_mean": ((7,), 4)}
    for info in walk.layers:
        found[f"{info.name}.weight"] = (info.weight_shape, ITEMSIZE[info.dtype])
        if info.has_bias:
            found[f"{info.name}.bias"] = (info.weight_shape[:1], ITEMSIZE[info.dtype])
    return found


NET = Walk(
    (
        layer("stem", (16, 3, 3, 3), Role.STEM),
        layer("layer1.conv1", (16, 16, 3, 3)),
        layer("layer1.conv2", (32, 16, 3, 3), bias=False),
        layer("layer1.depthwise", (32, 1, 3, 3), Role.DEPTHWISE, groups=32),
        layer("layer2.tied", (8, 8), Role.LINEAR, reason=Reason.TIED_WEIGHT),
        layer("layer2.attention", (8, 8), Role.ATTENTION),
        layer("layer2.mlp", (12, 5), Role.LINEAR, aliases=("layer3.mlp",)),
        layer("fc", (10, 32), Role.HEAD),
    ),
    "tree",
)


def planned(walk: Walk = NET, route: Route = "trained", **settings: object) -> Plan:
    """A plan for dotted policy settings, with `__` for the dot."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return make_plan(walk, load_policy(overrides=overrides), route=route, seed=3, tensors=tensors(walk))


def by_name(plan: Plan) -> dict[str, tuple[Verdict, Reason]]:
    return {entry.info.name: (entry.verdict, entry.reason) for entry in plan.layers}


# ---- who is converted ------------------------------------------------------------------------------------------


def test_defaults_keep_what_the_paper_keeps_static() -> None:
    assert by_name(planned()) == {
        "stem": (Verdict.STATIC, Reason.STEM_STATIC),
        "layer1.conv1": (Verdict.CONVERT, Reason.POLICY_DEFAULT),
        "layer1.conv2": (Verdict.CONVERT, Reason.POLICY_DEFAULT),
        "layer1.depthwise": (Verdict.STATIC, Reason.DEPTHWISE_STATIC),
        "layer2.tied": (Verdict.INELIGIBLE, Reason.TIED_WEIGHT),
        "layer2.attention": (Verdict.STATIC, Reason.ATTENTION_STATIC),
        "layer2.mlp": (Verdict.CONVERT, Reason.POLICY_DEFAULT),
        "fc": (Verdict.STATIC, Reason.HEAD_STATIC),
    }


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        {"name": "layer1.conv1", "convert": False},
        {"name": "layer1.*", "num_experts": 8, "dynamic_ratio": 0.5},
        {"role": "stem", "convert": True},
        {"name": "re:layer3[.]mlp", "granularity": "channel", "routing": "sequence"},
        {"type": "Conv2d", "name": "nothing*", "convert": False, "optional": True},
    ]
    plan = planned(rules=rules)
    assert by_name(plan)["layer1.conv1"] == (Verdict.STATIC, Reason.POLICY_RULE)
    chosen = {entry.info.name: (entry.rule, entry.choice) for entry in plan.converted}
    assert {name: rule for name, (rule, _) in chosen.items()} == {
        "stem": 2,
        "layer1.conv2": 1,
        "layer1.depthwise": 1,
        "layer2.mlp": 3,
    }
    depthwise, mlp = chosen["layer1.depthwise"][1], chosen["layer2.mlp"][1]
    assert depthwise is not None
    assert mlp is not None
    assert (depthwise.num_experts, depthwise.dynamic_ratio, depthwise.routing) == (8, Decimal("0.5"), Routing.MAP)
    assert (mlp.num_experts, mlp.granularity, mlp.routing) == (4, Granularity.CHANNEL, Routing.SEQUENCE)


def test_defaults_may_convert_nothing_but_what_rules_name() -> None:
    plan = planned(defaults__convert=False, rules=[{"name": "layer1.conv2", "dynamic_ratio": 0.5}])
    assert [entry.info.name for entry in plan.converted] == ["layer1.conv2"]
    assert by_name(plan)["layer1.conv1"] == (Verdict.STATIC, Reason.POLICY_DEFAULT)


def test_rules_that_match_nothing_are_all_named() -> None:
    rules = [
        {"name": "re:layer9", "convert": False},
        {"type": "Conv2", "convert": False},
        {"role": "stem", "type": "Linear", "convert": True},
        {"name": "absent", "optional": True, "convert": True},
    ]
    with pytest.raises(PolicyError) as caught:
        planned(rules=rules)
    text = str(caught.value)
    assert "rules[0].name: 're:layer9' matches no layer. Did you mean 'layer" in text
    assert "rules[1].type: 'Conv2' matches no layer. Did you mean 'Conv2d'?" in text
    assert "rules[2]: no layer meets all of type, role at once." in text
    assert "rules[3]" not in text
    assert "'padconvert inspect MODEL' lists the layers" in text


def test_a_rule_in_the_shadow_of_others_is_noted() -> None:
    plan = planned(rules=[{"name": "layer1.*", "dynamic_ratio": 0.5}, {"name": "layer1.conv1", "convert": False}])
    assert plan.notes == ("rules[1] decides nothing: earlier rules match all of its layers",)


def test_nothing_eligible_says_why() -> None:
    with pytest.raises(NothingEligibleError, match=r"1 × tied_weight .* 1 × head_static"):
        planned(Walk((NET.layers[4], NET.layers[7]), "tree"))
    with pytest.raises(NothingEligibleError, match=r"no convolution or linear layer.* nn\.Conv1d, .* nn\.Linear"):
        planned(Walk((), "tree"))


def test_nothing_eligible_advises_only_what_can_help() -> None:
    tied, head = NET.layers[4], NET.layers[7]
    with pytest.raises(NothingEligibleError, match="No rule can change that") as caught:
        planned(Walk((tied, layer("q", (8, 8), reason=Reason.WEIGHT_READ_BY_PARENT)), "tree"))
    assert "convert: true" not in str(caught.value)
    with pytest.raises(NothingEligibleError, match="A rule with 'convert: true' asks for a layer"):
        planned(Walk((tied, head), "tree"))
    with pytest.raises(NothingEligibleError, match="Drop or narrow the rules that say 'convert: false'"):
        planned(Walk((tied, head), "tree"), rules=[{"name": "*", "convert": False}])


def test_neuron_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match=r"rules\[0\]\.granularity: 'neuron' is for .*layer2\.mlp"):
        planned(rules=[{"name": "*mlp", "granularity": "neuron"}])
    with pytest.raises(PolicyError, match=r"^option --set .*: defaults\.granularity: 'neuron' is for .*layer1\.conv1"):
        planned(defaults__granularity="neuron")
    with pytest.raises(PolicyError, match=r"ffn\.granularity: 'neuron' is for .*use 'channel' or 'element' \(layer up"):
        planned(GATED, ffn__granularity="neuron", ffn__level="linear")


# ---- counts ----------------------------------------------------------------------------------------------------


@given(st.decimals(0, 1, places=9), st.integers(0, 10**12))
def test_exact_count_is_the_nearest_integer_ties_up(ratio: Decimal, n: int) -> None:
    count, exact = exact_count(ratio, n), Fraction(str(ratio)) * n
    assert -Fraction(1, 2) < count - exact <= Fraction(1, 2)
    assert 0 <= count <= n


def test_exact_count_knows_decimals_where_doubles_do_not() -> None:
    assert exact_count(Decimal("0.3"), 5) == 2  # 1.5
    assert math.floor(0.29 * 50 + 0.5) == 14
    assert exact_count(Decimal("0.29"), 50) == 15  # 14.5


def test_scope_layer_counts_weights_and_biases_exactly() -> None:
    plan = planned(partition__scope="layer")
    assert {entry.info.name: (entry.n_dynamic, entry.n_bias_dynamic) for entry in plan.converted} == {
        "layer1.conv1": (691, 5),
        "layer1.conv2": (1382, 0),
        "layer2.mlp": (18, 4),
    }
    assert plan.pools == ()
    channel = planned(partition__scope="layer", defaults__granularity="channel")
    assert {entry.info.name: (entry.n_dynamic, entry.n_bias_dynamic) for entry in channel.converted} == {
        "layer1.conv1": (5, 5),
        "layer1.conv2": (10, 0),
        "layer2.mlp": (4, 4),
    }


def test_ratio_one_stores_no_mask_and_ratio_zero_converts_nothing() -> None:
    one = planned(defaults__dynamic_ratio="1")
    assert (one.pools, one.cost.bytes_masks) == ((), 0)
    assert one.cost.bytes_output == one.cost.bytes_fully_dynamic
    zero = planned(defaults__dynamic_ratio=0)
    assert zero.converted == ()
    assert by_name(zero)["layer1.conv1"] == (Verdict.STATIC, Reason.RATIO_ROUNDS_TO_ZERO)
    assert zero.cost.bytes_output == zero.cost.bytes_source
    assert zero.notes == ("the dynamic ratio leaves no layer a dynamic unit: the output is the plain source again",)


def test_layers_of_one_unit_and_pools_too_tight_count_for_themselves() -> None:
    walk = Walk((layer("one", (1, 1)), layer("a", (2, 1)), layer("b", (2, 1)), layer("c", (1, 2))), "tree")
    plan = planned(walk, defaults__dynamic_ratio="0.25")  # 6 entries: 1.5 rounds to 2, but 3 layers want one each
    assert plan.pools == ()
    assert {entry.info.name: entry.n_dynamic for entry in plan.layers} == {"one": 0, "a": 1, "b": 1, "c": 1}
    assert by_name(plan)["one"] == (Verdict.STATIC, Reason.RATIO_ROUNDS_TO_ZERO)


# ---- laws ------------------------------------------------------------------------------------------------------

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)
LAYERS = st.lists(
    st.tuples(SHAPES, st.sampled_from(["float32", "float16", "float64"]), st.booleans(), st.booleans()),
    min_size=1,
    max_size=8,
)


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    drawn = draw(LAYERS)
    roles = [Role.CONV, *(Role.HEAD if is_head else Role.CONV for *_, is_head in drawn[1:])]
    infos = [
        layer(f"layer{index}", shape, role, bias=bias, dtype=dtype)
        for index, ((shape, dtype, bias, _), role) in enumerate(zip(drawn, roles, strict=True))
    ]
    return Walk(tuple(infos), "tree")


@st.composite
def policies(draw: st.DrawFn) -> Resolved:
    overrides: dict[str, object] = {
        "defaults.dynamic_ratio": draw(st.decimals(0, 1, places=3)),
        "defaults.num_experts": draw(st.integers(2, 5)),
        "defaults.granularity": draw(st.sampled_from(["element", "channel"])),
        "defaults.router": draw(st.sampled_from(router_names())),
        "partition.scope": draw(st.sampled_from(["global", "layer"])),
        "rules": draw(st.sampled_from([[], [{"name": "layer[13]", "dynamic_ratio": "0.5", "optional": True}]])),
    }
    return load_policy(overrides=overrides)


ROUTES = st.sampled_from(["trained", "data-free"])


def any_allowed_counts(plan: Plan) -> dict[str, int]:
    """Numbers of dynamic units that the plan allows, its pools filled layer by layer from the front."""
    counts = {entry.info.name: entry.n_dynamic for entry in plan.converted if entry.n_dynamic is not None}
    entries = {entry.info.name: entry for entry in plan.converted}
    for pool in plan.pools:
        left = pool.target - sum(math.prod(entries[n].info.weight_shape) // entries[n].n_units for n in pool.names)
        for name in pool.names:
            size = math.prod(entries[name].info.weight_shape) // entries[name].n_units
            more = min(entries[name].n_units - 2, left // size)
            counts[name] = 1 + more
            left -= more * size
        assert left >= 0
    return counts


def stored_bytes(plan: Plan, counts: dict[str, int]) -> tuple[int, int, int]:
    """Bytes of values, masks and routers, from the tensors that checkpoint format 1 would hold."""
    values = masks = routers = 0
    for entry in plan.converted:
        info, choice = entry.info, entry.choice
        assert choice is not None
        numel, rows, dynamic = math.prod(info.weight_shape), info.weight_shape[0], counts[entry.info.name]
        copies = 1 if plan.route == "data-free" else choice.num_experts
        shapes: list[tuple[int, ...]]
        if choice.granularity is Granularity.ELEMENT:
            bias = exact_count(choice.dynamic_ratio, rows) if info.has_bias else 0
            assert entry.n_bias_dynamic == bias
            shapes = [(numel - dynamic,), (copies, dynamic)]
            masks += math.ceil(numel / 8) if 0 < dynamic < numel else 0
            masks += math.ceil(rows / 8) if 0 < bias < rows and info.has_bias else 0
        else:
            bias = dynamic if info.has_bias else 0
            shapes = [(rows - dynamic, *info.weight_shape[1:]), (copies, dynamic, *info.weight_shape[1:])]
            masks += 4 * dynamic if 0 < dynamic < rows else 0
        shapes += [(rows - bias,), (copies, bias)] if info.has_bias else []
        values += sum(math.prod(shape) for shape in shapes) * ITEMSIZE[info.dtype]
        channels = info.weight_shape[1] * info.groups
        stored = tensor_shapes(choice.router, channels, choice.num_experts).values()
        routers += 4 * sum(math.prod(shape) for shape in stored)
    return values, masks, routers


@given(walks(), policies(), ROUTES)
def test_a_plan_is_a_function_and_predicts_what_would_be_stored(walk: Walk, resolved: Resolved, route: Route) -> None:
    plan = make_plan(walk, resolved, route=route, seed=0, tensors=tensors(walk))
    assert plan == make_plan(walk, resolved, route=route, seed=0, tensors=tensors(walk))
    assert plan_from_json(plan_to_json(plan)) == plan
    check_plan_fits(plan, walk, None)
    cost = plan.cost
    assert cost.bytes_output == cost.bytes_values + cost.bytes_masks + cost.bytes_router + cost.bytes_untouched
    exact = not plan.pools or resolved.policy.defaults.granularity == "element"
    if exact:
        stored = stored_bytes(plan, any_allowed_counts(plan))
        assert (cost.bytes_values, cost.bytes_masks, cost.bytes_router) == stored


@given(walks(), policies(), ROUTES)
def test_pools_and_exact_layers_partition_the_converted(walk: Walk, resolved: Resolved, route: Route) -> None:
    plan = make_plan(walk, resolved, route=route, seed=0, tensors=tensors(walk))
    pooled = [name for pool in plan.pools for name in pool.names]
    exact = [entry.info.name for entry in plan.converted if entry.n_dynamic is not None]
    assert sorted(pooled + exact) == sorted(entry.info.name for entry in plan.converted)
    entries = {entry.info.name: entry for entry in plan.converted}
    for pool in plan.pools:
        assert (route, resolved.policy.partition.scope) == ("trained", "global")
        assert pool.n_entries == sum(math.prod(entries[name].info.weight_shape) for name in pool.names)
        assert pool.target == math.floor(Fraction(pool.ratio) * pool.n_entries + Fraction(1, 2))
        same = {(entries[name].choice, entries[name].info.dtype) for name in pool.names}
        assert len({(c.dynamic_ratio, c.num_experts, c.granularity, dtype) for c, dtype in same if c}) == 1


@given(walks(), policies())
def test_fully_dynamic_is_the_same_plan_at_ratio_one(walk: Walk, resolved: Resolved) -> None:
    defaults = resolved.policy.defaults.model_copy(update={"dynamic_ratio": Decimal(1)})
    rules = tuple(rule.model_copy(update={"dynamic_ratio": None, "convert": True}) for rule in resolved.policy.rules)
    plan = make_plan(walk, resolved, route="trained", seed=0, tensors=tensors(walk))
    full_policy = resolved.policy.model_copy(update={"defaults": defaults, "rules": rules})
    full = make_plan(walk, full_policy, route="trained", seed=0, tensors=tensors(walk))
    if len(full.converted) == len(plan.converted):
        assert plan.cost.bytes_fully_dynamic == full.cost.bytes_output
        assert plan.cost.params_fully_dynamic == full.cost.params_output


def test_filters_ranked_together_are_predicted_within_one_filter() -> None:
    plan = planned(defaults__granularity="channel")
    (pool,) = plan.pools
    assert (pool.n_entries, pool.target) == (2304 + 4608 + 60, exact_count(Decimal("0.3"), 6972))
    values, _, _ = stored_bytes(plan, {"layer1.conv1": 7, "layer1.conv2": 7, "layer2.mlp": 6})
    dynamic_entries = 14 * 144 + 6 * 5
    assert abs(dynamic_entries - pool.target) <= 144
    assert abs(values - plan.cost.bytes_values) <= (144 + 1) * 4 * 4


def test_data_free_experts_are_stored_once() -> None:
    plan = planned(route="data-free")
    assert (plan.policy.partition.score, plan.policy.partition.scope) == ("magnitude", "layer")
    assert plan.notes == ("without data the score is magnitude and the scope layer (the policy: taylor, global)",)
    assert plan.cost.bytes_values == 4 * (2304 + 16 + 4608 + 60 + 12)
    assert plan.cost.bytes_masks == 288 + 2 + 576 + 8 + 2
    assert plan.cost.params_output - plan.cost.params_source == plan.cost.bytes_router // 4
    assert plan.cost.bytes_fully_dynamic == planned().cost.bytes_fully_dynamic


# ---- the file, and words ---------------------------------------------------------------------------------------


def edited(plan: Plan, *path: str | int, value: object) -> str:
    data = json.loads(plan_to_json(plan))
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("schema",), "padconvert.plan/2", "schema is 'padconvert.plan/2'"),
        (("sead",), 1, "sead: unknown"),
        (("seed",), "3", "seed: Input should be a valid integer"),
        (("layers", 0, "info", "color"), "red", r"layers\[0\]\.info\.color: unknown"),
        (("layers", 1, "reason"), "because", r"layers\[1\]\.reason"),
        (("policy", "defaults", "num_experts"), 1, r"policy\.defaults\.num_experts"),
        (("layers", 1, "n_dynamic"), 10**6, "n_dynamic 1000000 is not within its 2304 units"),
        (("layers", 1, "n_dynamic"), None, "n_dynamic is given by the layer or by one pool"),
        (("layers", 1, "n_units"), 10**6, "n_units 1000000 is not what its weight has"),
        (("layers", 4, "verdict"), "convert", "verdict and choice contradict each other"),
        (("layers", 1, "info", "name"), "stem", "listed 2 times"),
    ],
)
def test_a_plan_is_read_strictly(path: tuple[str | int, ...], value: object, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        plan_from_json(edited(planned(partition__scope="layer"), *path, value=value))


def test_the_rate_goes_with_the_optimizer() -> None:
    for said, expected in (({}, 3e-4), ({"train__optimizer": "sgd"}, 0.01), ({"train__lr": 0.5}, 0.5)):
        assert planned(**said).policy.train.lr == expected, said


def test_routers_begin_surer_than_even() -> None:
    """With two experts, 0.5 is even routing: no expert would ever differ."""
    with pytest.raises(PolicyError, match=r"train\.top_probability: with 2 experts it is above 0\.5, where all are"):
        planned(train__top_probability=0.5, defaults__num_experts=2)
    planned(train__top_probability=0.5, defaults__num_experts=2, defaults__router="mlp")  # reads no data
    planned(train__top_probability=0.5, defaults__num_experts=3)
    planned(defaults__num_experts=2)


def test_a_plan_must_fit_its_source() -> None:
    plan = replace(planned(), source_sha256="a" * 64)
    check_plan_fits(plan, NET, "a" * 64)
    with pytest.raises(PolicyError, match="another source"):
        check_plan_fits(plan, NET, "b" * 64)
    with pytest.raises(PolicyError, match="layer fc is in the plan only"):
        check_plan_fits(plan, replace(NET, layers=NET.layers[:-1]), None)
    other = (*NET.layers[:-1], layer("fc", (10, 33), Role.HEAD))
    with pytest.raises(PolicyError, match="layer fc is not what the plan was made for"):
        check_plan_fits(plan, replace(NET, layers=other), None)


def test_explain_says_who_decided() -> None:
    plan = planned(rules=[{"name": "layer1.conv1", "dynamic_ratio": 0.5}, {"name": "layer2.*", "convert": True}])
    text = explain_layer(plan, "layer1.conv1")
    assert "convert: rules[0] (name 'layer1.conv1'; option --set rules=" in text
    assert "dynamic_ratio: 0.5  # rules[0].dynamic_ratio" in text
    assert "num_experts: 4  # defaults.num_experts, preset paper" in text
    assert "routing: map  # convolutions are always routed by the mean of their input map" in text
    assert "routing: token  # defaults.routing, preset paper" in explain_layer(plan, "layer2.mlp")
    assert "dynamic units: 1,152 of 2,304" in text
    assert "static: the first convolution stays static by default (stem_static)" in explain_layer(plan, "stem")
    assert "ineligible: its weight belongs to another module too; rules[1]" in explain_layer(plan, "layer2.tied")
    assert "also called layer3.mlp" in explain_layer(plan, "layer3.mlp")
    assert "decided by the ranking over 3 layers" in explain_layer(plan, "layer1.conv2")
    with pytest.raises(UsageError, match=r"no layer 'layer1\.conv9'\. Did you mean 'layer1\.conv"):
        explain_layer(plan, "layer1.conv9")
