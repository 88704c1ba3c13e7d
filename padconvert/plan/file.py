"""`plan.json`: a plan written down, read back as strictly as it was written, and held against a source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from padconvert.errors import FileError, PolicyError, UsageError
from padconvert.plan.blocks import block_fault, blocks_of
from padconvert.plan.count import n_units
from padconvert.plan.decide import choice_fault, in_force
from padconvert.plan.model import LayerChoice, LayerPlan, Plan, Route
from padconvert.policy import Resolved, said_at, settings_of
from padconvert.policy.records import record_from_dict, record_to_dict
from padconvert.walk.info import LayerInfo, Walk
from padconvert.words import Kind, Routing, Verdict

SCHEMA = "padconvert.plan/1"
MAX_BYTES = 64 << 20  # a layer takes about 1 KiB


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON text, stable to the byte."""
    return json.dumps({"schema": SCHEMA, **record_to_dict(plan)}, indent=1, ensure_ascii=False) + "\n"


def plan_from_json(text: str, label: str = "plan") -> Plan:
    """The inverse of `plan_to_json`; `label` names the file. Raises PolicyError where anything is off."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{label}: this is not JSON: {error}") from None
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise PolicyError(f"{label}: schema is {schema!r}, not {SCHEMA!r}; write one with 'convert --plan-out FILE'")
    try:
        plan = record_from_dict(Plan, data)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{label}: {error}; write it again with 'convert --plan-out'") from None
    fault = _inconsistency(plan)
    if fault:
        raise PolicyError(f"{label}: {fault}; write it again with 'convert --plan-out'")
    return plan


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises FileError where it cannot be read, PolicyError where it is no plan."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: the plan cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{path}: the file is larger than {MAX_BYTES >> 20} MiB; that is no plan")
    try:
        return plan_from_json(data.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: this is not UTF-8 text, so no plan") from None


def check_plan_fits(plan: Plan, walk: Walk, source_sha256: str | None) -> None:
    """Raises PolicyError unless `plan` was made for this source (by sha256, if both are known) and these layers."""
    again = "make a new one with 'convert --dry-run --plan-out FILE'"
    if None not in (plan.source_sha256, source_sha256) and plan.source_sha256 != source_sha256:
        raise PolicyError(
            f"the plan was made for another source (sha256 {str(plan.source_sha256)[:12]}…, "
            f"this one has {str(source_sha256)[:12]}…); {again}"
        )
    planned = {layer.info.name: layer.info for layer in plan.layers}
    found = {info.name: info for info in walk.layers}
    chosen = {layer.info.name: layer.choice for layer in plan.layers}
    for name in [*found, *(planned.keys() - found.keys())]:
        before, now = planned.get(name), found.get(name)
        if before is None or now is None:
            raise PolicyError(f"layer {name} is in the {'source' if now else 'plan'} only; {again}")
        if _shape_of(before) != _shape_of(now):
            raise PolicyError(f"layer {name} is not what the plan was made for; {again}")
        choice = chosen.get(name)
        if now.causal and choice is not None and choice.routing is Routing.SEQUENCE:
            raise PolicyError(f"layer {name} is causal, and the plan routes it by its sequence; {again}")


def _shape_of(info: LayerInfo) -> tuple[object, ...]:
    """What a decision over a layer stands on."""
    block = (info.group, info.place)
    return (info.type, info.weight_shape, info.dtype, info.has_bias, info.groups, info.eligible, *block)


def check_plan_terms(
    plan: Plan, route: Route, seed: int, resolved: Resolved, where: str, *, preset: str | None = None
) -> None:
    """Raises UsageError where a run's words contradict its saved plan, which would win without a word.

    What no option and no file says is the plan's to decide, and data may lie elsewhere. `where` names the plan.
    """
    if plan.route != route:
        raise UsageError(f"{where}: made for the {plan.route} route, this run takes the {route} one.")
    if plan.seed != seed:
        raise UsageError(f"{where}: made with seed {plan.seed}, this run has {seed}. Give --seed {plan.seed}.")
    has_blocks = any(layer.info.group for layer in plan.layers)
    wanted = settings_of(in_force(resolved.policy, route, has_blocks=has_blocks)[0])
    planned = settings_of(plan.policy)
    changed = sorted(key for key in wanted if planned[key] != wanted[key] and not key.startswith("data."))
    for key in changed:
        said = said_at(resolved.origins, key)
        if said is not None and (preset is not None or not said.startswith("preset")):
            raise UsageError(
                f"{where}: made with {key} {planned[key]}, but {said} says {wanted[key]}. "
                "Leave that away, or make a new plan with --plan-out."
            )


def _inconsistency(plan: Plan) -> str | None:
    """What a hand-edited plan may get wrong that later stages rely on."""
    names = Counter(layer.info.name for layer in plan.layers)
    pooled = Counter(name for pool in plan.pools for name in pool.names)
    for name, count in (names + pooled).items():
        if names[name] != 1 or pooled[name] > 1:
            return f"layer {name} is listed {count} times, or in a pool only"
    for layer in plan.layers:
        converted = layer.verdict is Verdict.CONVERT
        if converted != (layer.choice is not None) or (converted and not layer.info.eligible):
            return f"layer {layer.info.name}: verdict and choice contradict each other"
        if converted and (layer.n_dynamic is None) != (layer.info.name in pooled):
            return f"layer {layer.info.name}: n_dynamic is given by the layer or by one pool"
        if layer.choice is not None and layer.n_units != n_units(layer.info, layer.choice.granularity):
            return f"layer {layer.info.name}: n_units {layer.n_units} is not what its weight has"
        if layer.n_dynamic is not None and not 0 <= layer.n_dynamic <= layer.n_units:
            return f"layer {layer.info.name}: n_dynamic {layer.n_dynamic} is not within its {layer.n_units} units"
        fault = None if layer.choice is None else _choice_fault(layer, layer.choice)
        if fault is not None:
            return f"layer {layer.info.name}: {fault}"
    for name, members in blocks_of(plan.layers).items():
        as_one = any(member.choice is not None and member.choice.group for member in members)
        fault = block_fault(name, members) if as_one else None
        if fault is not None:
            return f"feed-forward block {name}: {fault}"
    return None


def _choice_fault(layer: LayerPlan, choice: LayerChoice) -> str | None:
    if choice.group not in ("", layer.info.group):
        return f"it belongs to no feed-forward block {choice.group}"
    if (choice.routing is Routing.MAP) != (layer.info.kind is not Kind.LINEAR):
        return f"a {layer.info.kind} layer is not routed by {choice.routing}"
    if choice.routing is Routing.MAP and choice.top_k:
        return "convolutions mix all experts, so top_k is 0"
    fault = choice_fault(layer.info, choice)
    return f"{fault[0]} {fault[1]}" if fault else None
