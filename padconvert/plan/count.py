"""How many units of which layer stay dynamic: exactly, and never by a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import assert_never

from padconvert.plan.model import LayerPlan, Pool
from padconvert.walk.info import LayerInfo
from padconvert.words import Granularity, Reason, Verdict


def exact_count(ratio: Decimal, n: int) -> int:
    """⌊ratio·n + ½⌋ with the ratio as the decimal fraction it was written as (design §3)."""
    return math.floor(Fraction(ratio) * n + Fraction(1, 2))


def n_entries(info: LayerInfo) -> int:
    return math.prod(info.weight_shape)


def n_biases(info: LayerInfo) -> int:
    """Entries of the bias: one for each row of the weight, or none."""
    return info.weight_shape[0] if info.has_bias else 0


def n_units(info: LayerInfo, granularity: Granularity) -> int:
    """Entries, or filters (rows of the weight)."""
    match granularity:
        case Granularity.ELEMENT:
            return n_entries(info)
        case Granularity.CHANNEL:
            return info.weight_shape[0]
    assert_never(granularity)


def unit_size(layer: LayerPlan) -> int:
    """Weight entries in one unit of a converted layer."""
    return n_entries(layer.info) // layer.n_units


def with_counts(layers: Sequence[LayerPlan], *, pooled: bool) -> tuple[tuple[LayerPlan, ...], tuple[Pool, ...]]:
    """The layers with their numbers of dynamic units, and the pools that decide for the rest."""
    pools = _pools(layers) if pooled else ()
    in_pool = {name for pool in pools for name in pool.names}
    done = [_left_to_pool(layer) if layer.info.name in in_pool else _counted(layer) for layer in layers]
    return tuple(done), pools


def _counted(layer: LayerPlan) -> LayerPlan:
    """The layer with its own exact counts; static where no unit would stay dynamic."""
    if layer.choice is None:
        return layer
    dynamic = exact_count(layer.choice.dynamic_ratio, layer.n_units)
    if dynamic > 0:
        return replace(layer, n_dynamic=dynamic, n_bias_dynamic=_bias_count(layer, dynamic))
    static = replace(layer, verdict=Verdict.STATIC, reason=Reason.RATIO_ROUNDS_TO_ZERO)
    return replace(static, choice=None, n_units=0, n_dynamic=0, n_bias_dynamic=0)


def _left_to_pool(layer: LayerPlan) -> LayerPlan:
    return replace(layer, n_dynamic=None, n_bias_dynamic=_bias_count(layer, None))


def _bias_count(layer: LayerPlan, dynamic: int | None) -> int | None:
    """Dynamic bias entries: an exact share of their own with `element`, those of the filters with `channel`."""
    assert layer.choice is not None
    if not layer.info.has_bias:
        return 0
    match layer.choice.granularity:
        case Granularity.ELEMENT:
            return exact_count(layer.choice.dynamic_ratio, n_biases(layer.info))
        case Granularity.CHANNEL:
            return dynamic
    assert_never(layer.choice.granularity)


def _pools(layers: Sequence[LayerPlan]) -> tuple[Pool, ...]:
    groups: dict[tuple[Decimal, Granularity, int, str], list[LayerPlan]] = {}
    for layer in layers:
        choice = layer.choice
        if choice is not None and layer.n_units >= 2 and 0 < choice.dynamic_ratio < 1:
            key = (choice.dynamic_ratio, choice.granularity, choice.num_experts, layer.info.dtype)
            groups.setdefault(key, []).append(layer)
    found = [_pool(ratio, members) for (ratio, *_), members in groups.items()]
    return tuple(pool for pool in found if pool is not None)


def _pool(ratio: Decimal, members: Sequence[LayerPlan]) -> Pool | None:
    """A pool of at least two layers, if its target leaves each of them a dynamic and a static unit."""
    entries = sum(n_entries(layer.info) for layer in members)
    target = exact_count(ratio, entries)
    least = sum(unit_size(layer) for layer in members)
    if len(members) < 2 or not least <= target <= entries - least:
        return None
    return Pool(tuple(layer.info.name for layer in members), entries, target, ratio)
