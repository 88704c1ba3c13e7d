"""What a plan will cost, from shapes alone: the tensors of checkpoint format 1 (design §6), counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from padconvert.plan.count import exact_count, n_biases, n_entries, unit_size
from padconvert.plan.model import Cost, LayerPlan, Pool, Route
from padconvert.words import Granularity

#: shape and bytes per number of every tensor of the source, each once
TensorSizes = Mapping[str, tuple[tuple[int, ...], int]]

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4  # int32
ROUTER_BYTES = 4  # fp32 whatever the layer's dtype


@dataclass(frozen=True, slots=True)
class _Parts:
    """Numbers of one converted layer: entries of weight and bias in the source, and copies of the dynamic ones."""

    source: int
    dynamic: int
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
    converted = [layer for layer in layers if layer.choice is not None]
    parts = {layer.info.name: _parts(layer, pooled) for layer in converted}
    experts = {layer.info.name: layer.choice.num_experts for layer in converted if layer.choice}
    extra = {name: 0 if route == "data-free" else count - 1 for name, count in experts.items()}
    # (name, dynamic numbers): a pool's weights count under its first layer, since K and dtype are the same for all
    dynamic = [(name, part.dynamic) for name, part in parts.items()]
    dynamic += [(pool.names[0], pool.target) for pool in pools]

    numbers = sum(math.prod(shape) for shape, _ in tensors.values())
    bytes_source = sum(math.prod(shape) * itemsize for shape, itemsize in tensors.values())
    copied = sum(n * extra[name] for name, n in dynamic)
    copied_bytes = sum(n * extra[name] * parts[name].itemsize for name, n in dynamic)
    source_bytes = sum(part.source * part.itemsize for part in parts.values())
    router = sum(part.router for part in parts.values())
    masks = sum(part.mask_bytes for part in parts.values())
    full, full_bytes, full_router = _fully_dynamic(layers if asked is None else asked)
    assert bytes_source >= source_bytes, "the source's tensors lack a layer that the walk found"
    return Cost(
        params_source=numbers,
        params_output=numbers + copied + router,
        params_fully_dynamic=numbers + full + full_router,
        bytes_source=bytes_source,
        bytes_values=source_bytes + copied_bytes,
        bytes_masks=masks,
        bytes_router=router * ROUTER_BYTES,
        bytes_untouched=bytes_source - source_bytes,
        bytes_output=bytes_source + copied_bytes + masks + router * ROUTER_BYTES,
        bytes_fully_dynamic=bytes_source + full_bytes + full_router * ROUTER_BYTES,
    )


def _fully_dynamic(layers: Sequence[LayerPlan]) -> tuple[int, int, int]:
    """(further numbers, their bytes, router numbers) of the same layers at κ = 1, trained."""
    full = full_bytes = router = 0
    for layer in layers:
        if layer.choice is not None:
            copies = (n_entries(layer.info) + n_biases(layer.info)) * (layer.choice.num_experts - 1)
            full += copies
            full_bytes += copies * ITEMSIZE[layer.info.dtype]
            router += _router_numbers(layer.choice.router, _channels(layer), layer.choice.num_experts)
    return full, full_bytes, router


def _channels(layer: LayerPlan) -> int:
    return layer.info.weight_shape[1] * layer.info.groups


def _parts(layer: LayerPlan, pooled: set[str]) -> _Parts:
    info, choice = layer.info, layer.choice
    assert choice is not None
    units, size = layer.n_units, unit_size(layer)
    # A pool of filters decides how many of a layer's stay; their expected number stands in for indices and biases.
    expected = min(max(exact_count(choice.dynamic_ratio, units), 1), units - 1)
    dynamic = expected if layer.n_dynamic is None else layer.n_dynamic
    biases = dynamic * bool(info.has_bias) if layer.n_bias_dynamic is None else layer.n_bias_dynamic
    weights = 0 if info.name in pooled else dynamic * size
    return _Parts(
        source=n_entries(info) + n_biases(info),
        dynamic=weights + biases,
        mask_bytes=_mask_bytes(choice.granularity, dynamic, units) + _bias_mask_bytes(layer, biases),
        router=_router_numbers(choice.router, _channels(layer), choice.num_experts),
        itemsize=ITEMSIZE[info.dtype],
    )


def _mask_bytes(granularity: Granularity, dynamic: int, units: int) -> int:
    """The bitmask over all entries, or the index of each dynamic filter; none where all units are alike."""
    if not 0 < dynamic < units:
        return 0
    match granularity:
        case Granularity.ELEMENT:
            return (units + 7) // 8
        case Granularity.CHANNEL:
            return INDEX_BYTES * dynamic
    assert_never(granularity)


def _bias_mask_bytes(layer: LayerPlan, dynamic: int) -> int:
    """With `channel` the weight's index serves the bias too."""
    assert layer.choice is not None
    if layer.choice.granularity is Granularity.CHANNEL:
        return 0
    return _mask_bytes(layer.choice.granularity, dynamic, n_biases(layer.info))


def _router_numbers(router: str, channels: int, experts: int) -> int:
    """Numbers that a folded router stores, as the router's own file says."""
    from padconvert.layers.routers import tensor_shapes  # torch comes along

    return sum(math.prod(shape) for shape in tensor_shapes(router, channels, experts).values())
