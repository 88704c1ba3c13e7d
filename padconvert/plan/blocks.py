"""Feed-forward blocks (FFN) at level `ffn`: their layers are converted together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from padconvert.errors import PolicyError
from padconvert.plan.model import LayerChoice, LayerPlan
from padconvert.plan.rules import with_origin
from padconvert.policy import Resolved
from padconvert.words import Granularity, Place, Reason, Verdict


def decided_as_blocks(layers: Sequence[LayerPlan], resolved: Resolved) -> tuple[list[LayerPlan], list[str]]:
    """`layers`, decided one by one, without the blocks that have a layer which cannot be converted, and a note for each
    of those; a block with a layer that stays static by default stays static.

    Raises PolicyError where what is to happen differs between the layers of a block that are to be converted as one.
    """
    done, notes = list(layers), []
    for name, members in blocks_of(layers).items():
        if not any(member.choice is not None and member.choice.group for member in members):
            continue
        unable = [member.info for member in members if member.verdict is Verdict.INELIGIBLE]
        if unable:
            notes.append(f"the feed-forward block {name} is left alone: {unable[0].name} is {unable[0].reason.value}")
            done = [_left_alone(layer) if layer in members else layer for layer in done]
            continue
        if len({(member.verdict, _shared(member.choice)) for member in members}) == 1:
            continue
        if any(member.rule is not None for member in members):
            raise PolicyError(_differ(name, members, resolved))
        reason = next(member.reason for member in members if member.choice is None)
        done = [_kept_static(layer, reason) if layer in members else layer for layer in done]
    return done, notes


def blocks_of(layers: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """The layers of every proven feed-forward block by the block's name, whatever happens to them."""
    blocks: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.info.group:
            blocks.setdefault(layer.info.group, []).append(layer)
    return blocks


def block_fault(name: str, members: Sequence[LayerPlan]) -> str | None:
    """What is wrong with the layers of a block that are to be converted as one, if anything."""
    places = [member.info.place for member in members]
    if places.count(Place.FIRST) != 1 or places.count(Place.LAST) != 1 or places.count(Place.PEER) > 1:
        return "a block has one first and one last layer, and at most one peer"
    if len({_shared(member.choice) for member in members}) > 1:
        return "its layers are converted in one way"
    ups = {member.info.weight_shape for member in members if member.info.place is not Place.LAST}
    (down,) = (member.info.weight_shape for member in members if member.info.place is Place.LAST)
    if ups != {down[::-1]}:
        return f"shapes {sorted(ups)} and {down} are no block's"
    if any(member.info.place is Place.FIRST and member.info.name != name for member in members):
        return "a block is named for its first layer"
    counts = {member.n_dynamic for member in members}
    if _granularity(members[0].choice) is Granularity.NEURON and len(counts) > 1:
        return "a hidden unit is dynamic in all of its layers or in none"
    return None


def _shared(choice: LayerChoice | None) -> LayerChoice | None:
    """What the layers of a block have in common: all, but for the ratio where each has units of its own."""
    if choice is None or choice.granularity is Granularity.NEURON:
        return choice
    return replace(choice, dynamic_ratio=Decimal(0))


def _granularity(choice: LayerChoice | None) -> Granularity | None:
    return None if choice is None else choice.granularity


def _left_alone(layer: LayerPlan) -> LayerPlan:
    if layer.choice is None:
        return layer
    return LayerPlan(layer.info, Verdict.INELIGIBLE, Reason.FFN_NOT_PROVEN, layer.rule, None, 0, 0, 0)


def _kept_static(layer: LayerPlan, reason: Reason) -> LayerPlan:
    return LayerPlan(layer.info, Verdict.STATIC, reason, None, None, 0, 0, 0)


def _differ(name: str, members: Sequence[LayerPlan], resolved: Resolved) -> str:
    """Which rule decides over which part of the block, and what to do."""
    parts: dict[int | None, list[str]] = {}
    for member in members:
        parts.setdefault(member.rule, []).append(member.info.name)
    ruled = [(with_origin(f"rules[{rule}]", resolved.origins), parts[rule]) for rule in parts if rule is not None]
    decided = [*ruled, ("'ffn'", parts[None])] if None in parts else ruled
    said = "; ".join(f"{who} decides over {', '.join(names)}" for who, names in decided)
    return (
        f"{said}: the feed-forward block {name} is converted as a whole. Let one rule match all of its layers, or "
        "convert each by itself with 'level: linear'"
    )
