"""How many units of which layer stay dynamic: exactly, and never by a threshold.

What is counted and ranked as one is an *item*: a layer, or with `neuron` all layers of a feed-forward block, since a
hidden unit has entries in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import assert_never

from padconvert.plan.model import LayerPlan, Pool
from padconvert.walk.info import LayerInfo
from padconvert.words import Granularity, Place, Reason, Verdict

_Item = tuple[LayerPlan, ...]
#: layers are ranked together where these are the same: κ, the unit, K, top-k, dtype
_Key = tuple[Decimal, Granularity, int, int, str]


def exact_count(ratio: Decimal, n: int) -> int:
    """⌊ratio·n + ½⌋ with the ratio as the decimal fraction it was written as (design §3)."""
    return math.floor(Fraction(ratio) * n + Fraction(1, 2))


def n_entries(info: LayerInfo) -> int:
    return math.prod(info.weight_shape)


def n_biases(info: LayerInfo) -> int:
    """Entries of the bias: one for each row of the weight, or none."""
    return info.weight_shape[0] if info.has_bias else 0


def n_units(info: LayerInfo, granularity: Granularity) -> int:
    """Entries, filters (rows of the weight), or hidden units (columns of a block's last layer, rows of the others)."""
    match granularity:
        case Granularity.ELEMENT:
            return n_entries(info)
        case Granularity.CHANNEL:
            return info.weight_shape[0]
        case Granularity.NEURON:
            return info.weight_shape[1 if info.place is Place.LAST else 0]
    assert_never(granularity)


def unit_size(layer: LayerPlan) -> int:
    """Weight entries in one unit of a converted layer; of a hidden unit, those in this layer."""
    return n_entries(layer.info) // layer.n_units


def item_sizes(names: Iterable[str], layers: Mapping[str, LayerPlan]) -> list[int]:
    """Weight entries in one unit of each item of a pool; `layers` are the plan's by name."""
    return [_item_size(item) for item in _items([layers[name] for name in names])]


def with_counts(layers: Sequence[LayerPlan], *, pooled: bool) -> tuple[tuple[LayerPlan, ...], tuple[Pool, ...]]:
    """The layers with their numbers of dynamic units, and the pools that decide for the rest.

    A layer of which no unit would stay dynamic becomes static, but for one of a feed-forward block of which another
    layer keeps some: the block is converted as a whole.
    """
    pools = _pools(layers) if pooled else ()
    in_pool = {name for pool in pools for name in pool.names}
    done = [layer if layer.choice is None else _counted(layer, layer.info.name in in_pool) for layer in layers]
    alive = {_unit_of_conversion(layer) for layer in done if layer.n_dynamic != 0}
    return tuple(layer if _unit_of_conversion(layer) in alive else _rounded_away(layer) for layer in done), pools


def _unit_of_conversion(layer: LayerPlan) -> str:
    return layer.choice.group if layer.choice is not None and layer.choice.group else layer.info.name


def _counted(layer: LayerPlan, in_pool: bool) -> LayerPlan:
    """The layer with its own exact counts, or with those open that its pool decides."""
    assert layer.choice is not None
    dynamic = None if in_pool else exact_count(layer.choice.dynamic_ratio, layer.n_units)
    return replace(layer, n_dynamic=dynamic, n_bias_dynamic=_bias_count(layer, dynamic))


def _rounded_away(layer: LayerPlan) -> LayerPlan:
    if layer.choice is None:
        return layer
    static = replace(layer, verdict=Verdict.STATIC, reason=Reason.RATIO_ROUNDS_TO_ZERO)
    return replace(static, choice=None, n_units=0, n_dynamic=0, n_bias_dynamic=0)


def _bias_count(layer: LayerPlan, dynamic: int | None) -> int | None:
    """Dynamic bias entries: an exact share of their own with `element`, else those of the `dynamic` rows."""
    assert layer.choice is not None
    if n_bias_units(layer) == 0:
        return 0
    match layer.choice.granularity:
        case Granularity.ELEMENT:
            return exact_count(layer.choice.dynamic_ratio, n_biases(layer.info))
        case Granularity.CHANNEL | Granularity.NEURON:
            return dynamic
    assert_never(layer.choice.granularity)


def n_bias_units(layer: LayerPlan) -> int:
    """Bias entries of a converted layer that can be dynamic: all, but none where units are columns."""
    assert layer.choice is not None
    by_column = layer.choice.granularity is Granularity.NEURON and layer.place is Place.LAST
    return 0 if by_column else n_biases(layer.info)


def _pools(layers: Sequence[LayerPlan]) -> tuple[Pool, ...]:
    alike: dict[_Key, list[_Item]] = {}
    for item in _items(layers):
        choice, dtypes = item[0].choice, {layer.info.dtype for layer in item}
        # a block of several dtypes counts for itself: how many bytes a pool keeps dynamic must not depend on which win
        if choice is not None and item[0].n_units >= 2 and 0 < choice.dynamic_ratio < 1 and len(dtypes) == 1:
            key = (choice.dynamic_ratio, choice.granularity, choice.num_experts, choice.top_k, item[0].info.dtype)
            alike.setdefault(key, []).append(item)
    found = [_pool(ratio, items) for (ratio, *_), items in alike.items()]
    return tuple(pool for pool in found if pool is not None)


def _items(layers: Iterable[LayerPlan]) -> list[_Item]:
    """Converted layers, those of a block of `neuron` granularity together, in the order of their first ones."""
    found: dict[tuple[str, bool], list[LayerPlan]] = {}
    for layer in layers:
        if layer.choice is not None:
            together = layer.choice.granularity is Granularity.NEURON
            found.setdefault((layer.choice.group if together else layer.info.name, together), []).append(layer)
    return [tuple(item) for item in found.values()]


def _item_size(item: _Item) -> int:
    return sum(unit_size(layer) for layer in item)


def _pool(ratio: Decimal, items: Sequence[_Item]) -> Pool | None:
    """A pool of at least two items, if its target leaves each of them a dynamic and a static unit."""
    entries = sum(n_entries(layer.info) for item in items for layer in item)
    target = exact_count(ratio, entries)
    least = sum(_item_size(item) for item in items)
    if len(items) < 2 or not least <= target <= entries - least:
        return None
    return Pool(tuple(layer.info.name for item in items for layer in item), entries, target, ratio)
