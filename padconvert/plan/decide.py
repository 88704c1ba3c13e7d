"""Infos and policy in, a `Plan` out. Every refusal of a conversion happens here, before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from padconvert.errors import NothingEligibleError, PolicyError
from padconvert.plan.blocks import decided_as_blocks
from padconvert.plan.cost import TensorSizes, cost_of
from padconvert.plan.count import n_units, with_counts
from padconvert.plan.model import LayerChoice, LayerPlan, Plan, Route
from padconvert.plan.rules import first_matches, never_first, settings_for, with_origin
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
    policy, notes = in_force(resolved.policy, route, has_blocks=any(info.group for info in walk.layers))
    first = first_matches(policy.rules, walk.layers, resolved.origins)
    decided, broken = verdicts(walk, resolved, first)
    notes += broken
    asked = [layer for layer in decided if layer.choice is not None]
    if not asked:
        raise NothingEligibleError(_nothing(decided, walk))
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


def verdicts(
    walk: Walk, resolved: Resolved, first: Sequence[int | None] | None = None
) -> tuple[list[LayerPlan], list[str]]:
    """The verdict on every layer, its units not yet counted, and notes on blocks left alone; `first`: each layer's
    rule. Raises PolicyError as `make_plan`, and nothing where no layer is left."""
    if first is None:
        first = first_matches(resolved.policy.rules, walk.layers, resolved.origins)
    has_blocks = any(info.group for info in walk.layers)
    single = [_decide(info, resolved, rule, has_blocks) for info, rule in zip(walk.layers, first, strict=True)]
    return decided_as_blocks(single, resolved)


#: learning rates where the policy leaves them open: those that fine-tunes of real networks bore (docs/results.md), and
#: of transformers the usual one
RATES = {"sgd": 0.01, "adamw": 3e-4}
RATE_OF_BLOCKS = 2e-5


def in_force(policy: Policy, route: Route, *, has_blocks: bool) -> tuple[Policy, list[str]]:
    """The policy with what it leaves to the network (`has_blocks`: with feed-forward blocks) and to the route said.

    Without data nothing but the weights can be scored, layer by layer.
    """
    if policy.train.lr is None:
        optimizer = policy.train.optimizer
        rate = RATE_OF_BLOCKS if has_blocks and optimizer == "adamw" else RATES[optimizer]
        policy = policy.model_copy(update={"train": policy.train.model_copy(update={"lr": rate})})
    wanted = policy.partition
    if route == "trained" or (wanted.score, wanted.scope) == ("magnitude", "layer"):
        return policy, []
    partition = wanted.model_copy(update={"score": "magnitude", "scope": "layer"})
    note = f"without data the score is magnitude and the scope layer (the policy: {wanted.score}, {wanted.scope})"
    return policy.model_copy(update={"partition": partition}), [note]


def _decide(info: LayerInfo, resolved: Resolved, rule: int | None, has_blocks: bool) -> LayerPlan:
    """The verdict on one layer by itself. A rule that matches asks for conversion unless it says `convert: false`."""
    policy = resolved.policy
    if not info.eligible:
        return LayerPlan(info, Verdict.INELIGIBLE, info.reason, rule, None, 0, 0, 0)
    reason = _static_reason(info, policy, rule, has_blocks)
    if reason is not None:
        return LayerPlan(info, Verdict.STATIC, reason, rule, None, 0, 0, 0)
    if info.role is Role.FFN and not info.group and settings_for(info, policy, rule).level == "ffn":
        return LayerPlan(info, Verdict.INELIGIBLE, Reason.FFN_NOT_PROVEN, rule, None, 0, 0, 0)
    choice = _choice(info, resolved, rule, has_blocks)
    units = n_units(info, choice.granularity)
    reason = Reason.POLICY_DEFAULT if rule is None else Reason.POLICY_RULE
    return LayerPlan(info, Verdict.CONVERT, reason, rule, choice, units, None, None)


def _static_reason(info: LayerInfo, policy: Policy, rule: int | None, has_blocks: bool) -> Reason | None:
    if rule is not None:
        return Reason.POLICY_RULE if policy.rules[rule].convert is False else None
    if info.role in STATIC_ROLES:
        return STATIC_ROLES[info.role]
    if has_blocks and info.role is Role.LINEAR and not info.group:
        return Reason.LINEAR_STATIC
    return None if settings_for(info, policy, None).choice.convert else Reason.POLICY_DEFAULT


def _choice(info: LayerInfo, resolved: Resolved, rule: int | None, has_blocks: bool) -> LayerChoice:
    """Raises PolicyError where the settings ask for what this layer cannot have."""
    found = settings_for(info, resolved.policy, rule)
    settings, is_linear = found.choice, info.kind is Kind.LINEAR
    choice = LayerChoice(
        dynamic_ratio=settings.dynamic_ratio,
        num_experts=settings.num_experts,
        granularity=Granularity(settings.granularity),
        scales=settings.scales,
        router=settings.router,
        routing=Routing(settings.routing) if is_linear else Routing.MAP,
        top_k=settings.top_k if is_linear else 0,
        group=info.group if found.level == "ffn" else "",
    )
    _check_sureness(choice, resolved)
    fault = choice_fault(info, choice)
    if fault is not None:
        key, text = fault
        if key == "granularity" and found.path(key) == "defaults.granularity" and has_blocks:
            text += ", or ask for it in the blocks alone with --set ffn.granularity=neuron"
        raise PolicyError(f"{with_origin(found.path(key), resolved.origins)}: {text} (layer {info.name})")
    return choice


def _check_sureness(choice: LayerChoice, resolved: Resolved) -> None:
    """Raises PolicyError where routers are to start less sure than even routing is: no expert would ever differ."""
    wanted, even = resolved.policy.train.top_probability, 1 / choice.num_experts
    if choice.router == "linear" and wanted is not None and wanted <= even:
        where = with_origin("train.top_probability", resolved.origins)
        raise PolicyError(
            f"{where}: with {choice.num_experts} experts it is above {even:.4g}, where all are used alike"
        )


def choice_fault(info: LayerInfo, choice: LayerChoice) -> tuple[str, str] | None:
    """The key that asks for the impossible, and why it is that."""
    if choice.granularity is Granularity.NEURON and not choice.group:
        why = "of feed-forward blocks at level 'ffn'"
        return "granularity", f"'neuron' is for the hidden units {why}; use 'channel' or 'element'"
    if choice.top_k > choice.num_experts:
        return "top_k", f"{choice.top_k} is more than there are experts: 'num_experts' is {choice.num_experts}"
    if choice.routing is Routing.SEQUENCE and info.causal:
        why = "the layer is causal, and the mean over a sequence would tell each token of later ones"
        return "routing", f"'sequence' cannot be: {why}; use 'token'"
    flat = info.input_shape is not None and len(info.input_shape) < 2
    if choice.routing is Routing.SEQUENCE and ((choice.group and flat) or info.by_sample is False):
        why = (
            "the layer's input is not [batch, positions, channels] as the network's own, so no token knows its sequence"
        )
        return "routing", f"'sequence' cannot be: {why}; use 'token'"
    if choice.group and choice.routing is Routing.TOKEN and choice.top_k == 0:
        why = "at level 'ffn' all experts can be mixed for a whole sequence only"
        return "top_k", f"0 cannot be with routing 'token': {why}; choose top_k ≥ 1, or routing: sequence"
    return None


def _nothing(layers: Sequence[LayerPlan], walk: Walk) -> str:
    if not layers:
        return (
            "the source has no convolution or linear layer, so there is nothing to convert. What can be converted are "
            "nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Linear, and subclasses that keep their forward"
        )
    counts: Mapping[Reason, int] = Counter(layer.reason for layer in layers)
    listed = ", ".join(f"{count} × {reason.value} ({reason.explanation})" for reason, count in counts.items())
    if walk.mixtures:
        listed += f", {len(walk.mixtures)} × {Reason.ALREADY_EXPERTS.value} ({walk.mixtures[0]})"
    if walk.method == "tree" and any(layer.reason is Reason.FFN_NOT_PROVEN for layer in layers):
        listed += f". No block can be proven without a forward, and there was none: {'; '.join(walk.notes)}"
    return f"no layer is left to convert: {listed}. {_way_out(layers)}"


def _way_out(layers: Sequence[LayerPlan]) -> str:
    """What a policy could change, if it could change anything."""
    static = [layer for layer in layers if layer.verdict is Verdict.STATIC]
    if any(layer.reason is Reason.FFN_NOT_PROVEN and layer.info.eligible for layer in layers):
        return (
            "With 'level: linear' (--set ffn.level=linear) layers of a block that is not proven convert by themselves"
        )
    if not static:
        return (
            "No rule can change that. What can be converted are convolutions and linear layers that are called "
            "themselves and own their weight"
        )
    if all(layer.reason is Reason.POLICY_RULE for layer in static):
        return "Drop or narrow the rules that say 'convert: false'"
    return "A rule with 'convert: true' asks for a layer kept static by default"
