"""What a plan will cost, from shapes alone: the tensors of checkpoint format 1 (design §6), counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from padconvert.plan.count import exact_count, n_bias_units, n_biases, n_entries, unit_size
from padconvert.plan.model import Cost, LayerPlan, Pool, Route
from padconvert.words import Granularity, Place

#: shape and bytes per number of every tensor of the source, each once
TensorSizes = Mapping[str, tuple[tuple[int, ...], int]]

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4  # int32
ROUTER_BYTES = 4  # fp32 whatever the layer's dtype


@dataclass(frozen=True, slots=True)
class _Parts:
    """Numbers of one converted layer: entries of weight and bias in the source, and of one copy of the dynamic ones.

    `stored` and `active` copies of those are in the file, and computed with for a token.
    """

    source: int
    dynamic: int
    stored: int
    active: int
    mask_bytes: int
    router: int
    itemsize: int


def cost_of(
    layers: Sequence[LayerPlan],
    pools: Sequence[Pool],
    route: Route,
    tensors: TensorSizes,
    asked: Sequence[LayerPlan] | None = None,
) -> Cost:
    """The predicted cost. Experts of a data-free artefact are equal and stored once.

    `asked` are the layers as the policy wants them, before a ratio rounds some to static ones: the fully dynamic
    network has them all.
    """
    pooled = {name for pool in pools for name in pool.names}
    parts = {layer.info.name: _parts(layer, pooled, route) for layer in layers if layer.choice is not None}
    # a pool's weights count under its first layer, since copies and dtype are the same for all
    dynamic = [(part, part.dynamic) for part in parts.values()]
    dynamic += [(parts[pool.names[0]], pool.target) for pool in pools]

    numbers = sum(math.prod(shape) for shape, _ in tensors.values())
    bytes_source = sum(math.prod(shape) * itemsize for shape, itemsize in tensors.values())
    copied = sum(n * (part.stored - 1) for part, n in dynamic)
    copied_bytes = sum(n * (part.stored - 1) * part.itemsize for part, n in dynamic)
    source_bytes = sum(part.source * part.itemsize for part in parts.values())
    router = sum(part.router for part in parts.values())
    masks = sum(part.mask_bytes for part in parts.values())
    full = [_parts_at_one(layer) for layer in (layers if asked is None else asked) if layer.choice is not None]
    full_router = sum(part.router for part in full)
    full_bytes = sum(part.dynamic * (part.stored - 1) * part.itemsize for part in full)
    assert bytes_source >= source_bytes, "the source's tensors lack a layer that the walk found"
    return Cost(
        params_source=numbers,
        params_output=numbers + copied + router,
        params_fully_dynamic=numbers + sum(part.dynamic * (part.stored - 1) for part in full) + full_router,
        bytes_source=bytes_source,
        bytes_values=source_bytes + copied_bytes,
        bytes_masks=masks,
        bytes_router=router * ROUTER_BYTES,
        bytes_untouched=bytes_source - source_bytes,
        bytes_output=bytes_source + copied_bytes + masks + router * ROUTER_BYTES,
        bytes_fully_dynamic=bytes_source + full_bytes + full_router * ROUTER_BYTES,
        params_active_output=numbers + sum(n * (part.active - 1) for part, n in dynamic) + router,
        params_active_fully_dynamic=numbers + sum(part.dynamic * (part.active - 1) for part in full) + full_router,
    )


def active_copies(stored: int, top_k: int) -> int:
    """How many of the `stored` copies of its dynamic entries a layer computes with for one token: `top_k`, or the one
    that is mixed out of all of them."""
    return min(stored, max(top_k, 1))


def _parts_at_one(layer: LayerPlan) -> _Parts:
    """The same layer at κ = 1, trained: all is dynamic that can be."""
    return _parts(replace(layer, n_dynamic=layer.n_units, n_bias_dynamic=n_bias_units(layer)), set(), "trained")


def _channels(layer: LayerPlan) -> int:
    return layer.info.weight_shape[1] * layer.info.groups


def _parts(layer: LayerPlan, pooled: set[str], route: Route) -> _Parts:
    info, choice = layer.info, layer.choice
    assert choice is not None
    units, size = layer.n_units, unit_size(layer)
    # A pool decides how many of a layer's units stay; their expected number stands in for indices and biases.
    expected = min(max(exact_count(choice.dynamic_ratio, units), 1), units - 1)
    dynamic = expected if layer.n_dynamic is None else layer.n_dynamic
    biases = dynamic * bool(info.has_bias) if layer.n_bias_dynamic is None else layer.n_bias_dynamic
    weights = 0 if info.name in pooled else dynamic * size
    stored = 1 if route == "data-free" else choice.num_experts
    return _Parts(
        source=n_entries(info) + n_biases(info),
        dynamic=weights + biases,
        stored=stored,
        active=active_copies(stored, choice.top_k),
        mask_bytes=_mask_bytes(layer, dynamic, units) + _bias_mask_bytes(layer, biases),
        router=_router_numbers(choice.router, _channels(layer), choice.num_experts) if layer.has_router else 0,
        itemsize=ITEMSIZE[info.dtype],
    )


def _mask_bytes(layer: LayerPlan, dynamic: int, units: int) -> int:
    """The bitmask over all entries, or the index of each dynamic filter or hidden unit (which a block lists once,
    under its first layer); none where all units are alike."""
    if not 0 < dynamic < units:
        return 0
    assert layer.choice is not None
    match layer.choice.granularity:
        case Granularity.ELEMENT:
            return _bitmask_bytes(units)
        case Granularity.CHANNEL:
            return INDEX_BYTES * dynamic
        case Granularity.NEURON:
            return INDEX_BYTES * dynamic if layer.place is Place.FIRST else 0
    assert_never(layer.choice.granularity)


def _bias_mask_bytes(layer: LayerPlan, dynamic: int) -> int:
    """The weight's index serves the bias too."""
    assert layer.choice is not None
    by_entry = layer.choice.granularity is Granularity.ELEMENT
    return _bitmask_bytes(n_biases(layer.info)) if by_entry and 0 < dynamic < n_biases(layer.info) else 0


def _bitmask_bytes(entries: int) -> int:
    return (entries + 7) // 8


def _router_numbers(router: str, channels: int, experts: int) -> int:
    """Numbers that a folded router stores, as the router's own file says."""
    from padconvert.layers.routers import tensor_shapes  # torch comes along

    return sum(math.prod(shape) for shape in tensor_shapes(router, channels, experts).values())
