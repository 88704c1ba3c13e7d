"""Infos and policy in, a `Plan` out. Every refusal of a conversion happens here, before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from padconvert.errors import NothingEligibleError, PolicyError
from padconvert.plan.cost import TensorSizes, cost_of
from padconvert.plan.count import n_units, with_counts
from padconvert.plan.model import LayerChoice, LayerPlan, Plan, Route
from padconvert.plan.rules import first_matches, never_first
from padconvert.policy import Policy, Resolved
from padconvert.walk.info import LayerInfo, Walk
from padconvert.words import Granularity, Kind, Reason, Role, Routing, Verdict

#: roles that stay static unless a rule asks for them, as in the paper
STATIC_ROLES = {
    Role.STEM: Reason.STEM_STATIC,
    Role.HEAD: Reason.HEAD_STATIC,
    Role.DEPTHWISE: Reason.DEPTHWISE_STATIC,
    Role.ATTENTION: Reason.ATTENTION_STATIC,
}


def make_plan(
    walk: Walk,
    policy: Policy | Resolved,
    *,
    route: Route,
    seed: int,
    tensors: TensorSizes,
    source_sha256: str | None = None,
) -> Plan:
    """Every decision for the layers of `walk`; a function of its arguments and nothing else.

    `tensors` gives shape and bytes per number of every tensor of the source, each once. A `Resolved` policy brings
    its origins along for `explain`. Raises PolicyError where a rule matches nothing or asks for the impossible,
    NothingEligibleError where no layer can or may be converted.
    """
    resolved = policy if isinstance(policy, Resolved) else Resolved(policy, {}, ())
    policy, notes = in_force(resolved.policy, route)
    first = first_matches(policy.rules, walk.layers, resolved.origins)
    decided = [_decide(info, policy, rule) for info, rule in zip(walk.layers, first, strict=True)]
    asked = [layer for layer in decided if layer.choice is not None]
    if not asked:
        raise NothingEligibleError(_nothing(decided))
    layers, pools = with_counts(decided, pooled=policy.partition.scope == "global")
    notes += never_first(policy.rules, walk.layers, first)
    if all(layer.choice is None for layer in layers):
        notes.append("the dynamic ratio leaves no layer a dynamic unit: the output is the plain source again")
    return Plan(
        layers=layers,
        pools=pools,
        cost=cost_of(layers, pools, route, tensors, asked),
        policy=policy,
        route=route,
        seed=seed,
        source_sha256=source_sha256,
        origins=dict(resolved.origins),
        notes=(*resolved.notes, *notes),
    )


def in_force(policy: Policy, route: Route) -> tuple[Policy, list[str]]:
    """Without data nothing but the weights can be scored, layer by layer."""
    wanted = policy.partition
    if route == "trained" or (wanted.score, wanted.scope) == ("magnitude", "layer"):
        return policy, []
    partition = wanted.model_copy(update={"score": "magnitude", "scope": "layer"})
    note = f"without data the score is magnitude and the scope layer (the policy: {wanted.score}, {wanted.scope})"
    return policy.model_copy(update={"partition": partition}), [note]


def _decide(info: LayerInfo, policy: Policy, rule: int | None) -> LayerPlan:
    """The verdict on one layer. A rule that matches asks for conversion unless it says `convert: false`."""
    if not info.eligible:
        return LayerPlan(info, Verdict.INELIGIBLE, info.reason, rule, None, 0, 0, 0)
    reason = _static_reason(info, policy, rule)
    if reason is not None:
        return LayerPlan(info, Verdict.STATIC, reason, rule, None, 0, 0, 0)
    choice = _choice(info, policy, rule)
    units = n_units(info, choice.granularity)
    reason = Reason.POLICY_DEFAULT if rule is None else Reason.POLICY_RULE
    return LayerPlan(info, Verdict.CONVERT, reason, rule, choice, units, None, None)


def _static_reason(info: LayerInfo, policy: Policy, rule: int | None) -> Reason | None:
    if rule is not None:
        return Reason.POLICY_RULE if policy.rules[rule].convert is False else None
    if info.role in STATIC_ROLES:
        return STATIC_ROLES[info.role]
    return None if policy.defaults.convert else Reason.POLICY_DEFAULT


def _choice(info: LayerInfo, policy: Policy, rule: int | None) -> LayerChoice:
    settings = policy.defaults
    if rule is not None:
        settings = settings.model_copy(update=policy.rules[rule].overrides())
    if settings.granularity == "neuron":
        where = "defaults" if rule is None or policy.rules[rule].granularity is None else f"rules[{rule}]"
        raise PolicyError(
            f"{where}.granularity: 'neuron' is for whole feed-forward blocks, which are not converted yet; "
            f"use 'channel' or 'element' (layer {info.name})"
        )
    return LayerChoice(
        dynamic_ratio=settings.dynamic_ratio,
        num_experts=settings.num_experts,
        granularity=Granularity(settings.granularity),
        scales=settings.scales,
        router=settings.router,
        routing=Routing(settings.routing) if info.kind is Kind.LINEAR else Routing.MAP,
    )


def _nothing(layers: Sequence[LayerPlan]) -> str:
    if not layers:
        return (
            "the source has no convolution or linear layer, so there is nothing to convert. What can be converted are "
            "nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Linear, and subclasses that keep their forward"
        )
    counts: Mapping[Reason, int] = Counter(layer.reason for layer in layers)
    listed = ", ".join(f"{count} × {reason.value} ({reason.explanation})" for reason, count in counts.items())
    return f"no layer is left to convert: {listed}. {_way_out(layers)}"


def _way_out(layers: Sequence[LayerPlan]) -> str:
    """What a policy could change, if it could change anything."""
    static = [layer for layer in layers if layer.verdict is Verdict.STATIC]
    if not static:
        return (
            "No rule can change that. What can be converted are convolutions and linear layers that are called "
            "themselves and own their weight"
        )
    if all(layer.reason is Reason.POLICY_RULE for layer in static):
        return "Drop or narrow the rules that say 'convert: false'"
    return "A rule with 'convert: true' asks for a layer kept static by default"
