"""Why a layer has its verdict, in words."""

from __future__ import annotations

from padconvert.errors import UsageError
from padconvert.plan.count import n_entries
from padconvert.plan.model import LayerPlan, Plan
from padconvert.plan.rules import settings_for
from padconvert.policy import Rule, did_you_mean, said_at
from padconvert.words import Reason, Routing, Verdict

SETTINGS = ("dynamic_ratio", "num_experts", "granularity", "scales", "router", "routing", "top_k")


def explain_layer(plan: Plan, name: str) -> str:
    """What happens to the layer, who decided that and where it was said. Raises UsageError for an unknown name."""
    layer = next((entry for entry in plan.layers if name in (entry.info.name, *entry.info.aliases)), None)
    if layer is None:
        near = did_you_mean(name, [entry.info.name for entry in plan.layers])
        raise UsageError(f"the plan has no layer {name!r}.{near} It has {len(plan.layers)} layers.")
    lines = [_head(layer), f"  {layer.verdict.value}: {_decision(plan, layer)} ({layer.reason.value})"]
    if layer.choice is not None:
        level = settings_for(layer.info, plan.policy, layer.rule).level
        lines += [f"  {_setting(plan, layer, key)}" for key in (SETTINGS if level is None else (*SETTINGS, "level"))]
        lines.append(f"  {_count(plan, layer)}")
    return "\n".join(lines)


def _head(layer: LayerPlan) -> str:
    info = layer.info
    aliases = f", also called {', '.join(info.aliases)}" if info.aliases else ""
    block = f", {info.place.value} of the feed-forward block {info.group}" if info.group else ""
    return f"{info.name}: {info.type}, role {info.role.value}, {n_entries(info):,} weight entries{aliases}{block}"


def _decision(plan: Plan, layer: LayerPlan) -> str:
    detail = f" ({layer.info.detail})" if layer.info.detail else ""
    by_rule = "" if layer.rule is None else _rule(plan, layer.rule)
    match layer.verdict:
        case Verdict.INELIGIBLE:
            ignored = f"; {by_rule} matches it in vain" if by_rule else ""
            alone = layer.info.eligible and layer.reason is Reason.FFN_NOT_PROVEN
            way = "; 'level: linear' converts it by itself" if alone else ""
            return f"{layer.reason.explanation}{detail}{ignored}{way}"
        case Verdict.STATIC if layer.rule is None or layer.reason.value != "policy_rule":
            return layer.reason.explanation + (f"; {by_rule} asked for it" if by_rule else "")
        case _:
            return f"{by_rule} is the first that matches it" if by_rule else layer.reason.explanation


def _rule(plan: Plan, index: int) -> str:
    rule: Rule = plan.policy.rules[index]
    words = ", ".join(f"{key} {getattr(rule, key)!r}" for key in ("name", "type", "role") if getattr(rule, key))
    said = said_at(plan.origins, f"rules[{index}]")
    return f"rules[{index}] ({words}{f'; {said}' if said else ''})"


def _setting(plan: Plan, layer: LayerPlan, key: str) -> str:
    is_convolution = layer.choice is not None and layer.choice.routing is Routing.MAP
    if is_convolution and key == "routing":
        return f"{key}: {Routing.MAP}  # convolutions are always routed by the mean of their input map"
    if is_convolution and key == "top_k":
        return f"{key}: 0  # convolutions always mix all experts"
    settings = settings_for(layer.info, plan.policy, layer.rule)
    path = settings.path(key)
    said = said_at(plan.origins, path)
    value = settings.level if key == "level" else getattr(layer.choice, key)
    return f"{key}: {value}  # {path}{f', {said}' if said else ''}"


def _count(plan: Plan, layer: LayerPlan) -> str:
    pool = next((pool for pool in plan.pools if layer.info.name in pool.names), None)
    if pool is None:
        return f"dynamic units: {layer.n_dynamic:,} of {layer.n_units:,}"
    return (
        f"dynamic units: decided by the ranking over {len(pool.names):,} layers, which keep {pool.target:,} of "
        f"{pool.n_entries:,} entries together"
    )
