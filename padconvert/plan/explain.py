"""Why a layer has its verdict, in words."""

from __future__ import annotations

from padconvert.errors import UsageError
from padconvert.plan.count import n_entries
from padconvert.plan.model import LayerPlan, Plan
from padconvert.policy import Rule, did_you_mean, said_at
from padconvert.words import Routing, Verdict

SETTINGS = ("dynamic_ratio", "num_experts", "granularity", "scales", "router", "routing")


def explain_layer(plan: Plan, name: str) -> str:
    """What happens to the layer, who decided that and where it was said. Raises UsageError for an unknown name."""
    layer = next((entry for entry in plan.layers if name in (entry.info.name, *entry.info.aliases)), None)
    if layer is None:
        near = did_you_mean(name, [entry.info.name for entry in plan.layers])
        raise UsageError(f"the plan has no layer {name!r}.{near} It has {len(plan.layers)} layers.")
    lines = [_head(layer), f"  {layer.verdict.value}: {_decision(plan, layer)} ({layer.reason.value})"]
    if layer.choice is not None:
        lines += [f"  {_setting(plan, layer, key)}" for key in SETTINGS]
        lines.append(f"  {_count(plan, layer)}")
    return "\n".join(lines)


def _head(layer: LayerPlan) -> str:
    info = layer.info
    aliases = f", also called {', '.join(info.aliases)}" if info.aliases else ""
    return f"{info.name}: {info.type}, role {info.role.value}, {n_entries(info):,} weight entries{aliases}"


def _decision(plan: Plan, layer: LayerPlan) -> str:
    detail = f" ({layer.info.detail})" if layer.info.detail else ""
    by_rule = "" if layer.rule is None else _rule(plan, layer.rule)
    match layer.verdict:
        case Verdict.INELIGIBLE:
            ignored = f"; {by_rule} matches it in vain" if by_rule else ""
            return f"{layer.reason.explanation}{detail}{ignored}"
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
    if key == "routing" and layer.choice is not None and layer.choice.routing is Routing.MAP:
        return f"{key}: {layer.choice.routing}  # convolutions are always routed by the mean of their input map"
    by_rule = layer.rule is not None and key in plan.policy.rules[layer.rule].overrides()
    path = f"rules[{layer.rule}].{key}" if by_rule else f"defaults.{key}"
    said = said_at(plan.origins, path)
    return f"{key}: {getattr(layer.choice, key)}  # {path}{f', {said}' if said else ''}"


def _count(plan: Plan, layer: LayerPlan) -> str:
    pool = next((pool for pool in plan.pools if layer.info.name in pool.names), None)
    if pool is None:
        return f"dynamic units: {layer.n_dynamic:,} of {layer.n_units:,}"
    return (
        f"dynamic units: decided by the ranking over {len(pool.names)} layers, which keep {pool.target:,} of "
        f"{pool.n_entries:,} entries together"
    )
