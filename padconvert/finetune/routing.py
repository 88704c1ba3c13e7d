"""Set routers from data: the pooled inputs that each layer sees, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from padconvert.layers.kmeans import separation
from padconvert.layers.pad import PadLayer
from padconvert.layers.padding import real_tokens
from padconvert.walk.quiet import evaluating

#: pooled inputs kept for one layer; k-means gains nothing from more
MOST_POINTS = 4096
#: of how many kinds inputs are is not judged from fewer for each expert
FEWEST_POINTS = 10


def set_routers_(
    model: nn.Module,
    layers: Mapping[str, PadLayer],
    forwards: Iterable[Callable[[], object]],
    seed: int,
    top_probability: float | None,
) -> None:
    """Initialise every router from what its layer sees during `forwards` (eval mode, no gradient).

    All layers see the source's own activations, since upcycling has kept the function. A layer that saw nothing,
    or less than one point an expert, keeps its seeded random router.
    """
    seen = pooled_inputs(model, layers, forwards)
    for index, (name, layer) in enumerate(layers.items()):
        if name in seen and layer.router is not None:
            layer.router.initialise_(seen[name], _generator(seed, index), top_probability)


def separations(
    model: nn.Module, layers: Mapping[str, PadLayer], forwards: Iterable[Callable[[], object]], seed: int
) -> dict[str, float]:
    """How far each layer's pooled inputs fall into as many kinds as it has experts (`kmeans.separation`), by layer.

    Layers without a router of their own, and those that saw too little, are left out.
    """
    seen = pooled_inputs(model, layers, forwards)
    places = {name: index for index, name in enumerate(layers)}
    return {
        name: separation(points_NC, layers[name].num_experts, _generator(seed, places[name]))
        for name, points_NC in seen.items()
        if len(points_NC) >= FEWEST_POINTS * layers[name].num_experts
    }


def _generator(seed: int, index: int) -> Generator:
    return Generator().manual_seed(seed * 1_000_003 + index)


def pooled_inputs(
    model: nn.Module, layers: Mapping[str, PadLayer], forwards: Iterable[Callable[[], object]]
) -> dict[str, Tensor]:
    """What the routers read during `forwards`: [N, C] by layer, N from the layer's experts to `MOST_POINTS`."""
    seen: dict[str, list[Tensor]] = {name: [] for name, layer in layers.items() if layer.router is not None}
    hooks = [layers[name].register_forward_pre_hook(_watch(points)) for name, points in seen.items()]
    try:
        with evaluating(model), torch.no_grad():
            for forward in forwards:
                forward()
    finally:
        for hook in hooks:
            hook.remove()
    joined = {name: torch.cat(points)[:MOST_POINTS] for name, points in seen.items() if points}
    return {name: points_NC for name, points_NC in joined.items() if len(points_NC) >= layers[name].num_experts}


def _watch(seen: list[Tensor]) -> Callable[[nn.Module, Any], None]:
    """A hook that keeps the pooled inputs of a layer, evenly thinned where there are many tokens; no padding."""

    def keep(module: nn.Module, args: Any) -> None:
        assert isinstance(module, PadLayer)
        if sum(len(points) for points in seen) >= MOST_POINTS:
            return
        x = args[0].detach().to(module.mixing_dtype)
        points_NC = real_tokens(module.pooled(x))
        seen.append(points_NC[:: max(1, len(points_NC) // (MOST_POINTS // 4))].float().cpu())

    return keep
