"""The two ways to a Pad layer: upcycle a trained static one, or build an empty one for a checkpoint's values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never, cast

import torch
from torch import nn

from padconvert.layers.conv import PadConv1d, PadConv2d, PadConv3d
from padconvert.layers.facts import CALL_OPTIONS, LayerFacts
from padconvert.layers.linear import PadLinear
from padconvert.layers.pad import PadLayer
from padconvert.words import Granularity, Kind, Routing

Static = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def build_layer(facts: LayerFacts, device: torch.device | str | None = None) -> PadLayer:
    """An empty Pad layer of this shape, for values to be loaded into it."""
    match facts.kind:
        case Kind.CONV1D:
            return PadConv1d(facts, device)
        case Kind.CONV2D:
            return PadConv2d(facts, device)
        case Kind.CONV3D:
            return PadConv3d(facts, device)
        case Kind.LINEAR:
            return PadLinear(facts, device)
        case Kind.CONV_TRANSPOSE | Kind.UNKNOWN:
            raise AssertionError(f"no Pad layer for {facts.kind}")
        case _:
            assert_never(facts.kind)


def build_static(facts: LayerFacts, device: torch.device | str | None = None) -> Static:
    """The plain torch layer of this shape, not initialised."""
    options: dict[str, Any] = {
        "bias": facts.has_bias,
        "device": device or "cpu",
        "dtype": getattr(torch, facts.dtype),
    }
    if facts.kind is Kind.LINEAR:
        rows, columns = facts.weight_shape
        return cast(nn.Linear, nn.utils.skip_init(nn.Linear, columns, rows, **options))
    kinds: dict[Kind, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
        Kind.CONV1D: nn.Conv1d,
        Kind.CONV2D: nn.Conv2d,
        Kind.CONV3D: nn.Conv3d,
    }
    channels = (facts.weight_shape[1] * facts.groups, facts.weight_shape[0])
    options |= {name: getattr(facts, name) for name in CALL_OPTIONS}
    return cast(Static, nn.utils.skip_init(kinds[facts.kind], *channels, facts.weight_shape[2:], **options))


def facts_of_static(
    layer: Static, *, num_experts: int, granularity: Granularity, router: str, routing: Routing
) -> LayerFacts:
    """The facts of a fully dynamic layer (κ = 1) in place of a trained static one."""
    has_bias = layer.bias is not None
    units = layer.weight.numel() if granularity is Granularity.ELEMENT else layer.weight.shape[0]
    facts = LayerFacts(
        kind=kind_of(layer),
        granularity=granularity,
        num_experts=num_experts,
        weight_shape=tuple(layer.weight.shape),
        dtype=str(layer.weight.dtype).removeprefix("torch."),
        has_bias=has_bias,
        n_dynamic=units,
        n_bias_dynamic=layer.weight.shape[0] if has_bias else 0,
        router=router,
        routing=routing if isinstance(layer, nn.Linear) else Routing.MAP,
    )
    if isinstance(layer, nn.Linear):
        return facts
    return replace(facts, **{name: getattr(layer, name) for name in CALL_OPTIONS})


def kind_of(layer: Static) -> Kind:
    match layer:
        case nn.Conv1d():
            return Kind.CONV1D
        case nn.Conv2d():
            return Kind.CONV2D
        case nn.Conv3d():
            return Kind.CONV3D
        case nn.Linear():
            return Kind.LINEAR
        case _:
            assert_never(layer)


@torch.no_grad()
def upcycle(
    layer: Static,
    *,
    num_experts: int,
    granularity: Granularity,
    router: str,
    routing: Routing,
    learned_scales: bool,
    generator: torch.Generator,
) -> PadLayer:
    """A fully dynamic layer that computes what the static one does: D_k = W for every k, scale_logit = 0.

    Any routing then gives W(b) = Σ_k π_k W = W. The router is seeded by `generator`.
    """
    facts = facts_of_static(layer, num_experts=num_experts, granularity=granularity, router=router, routing=routing)
    pad = build_layer(facts, layer.weight.device)
    for part, source in (("weight", layer.weight), ("bias", layer.bias)):
        dynamic = getattr(pad, f"{part}_dynamic")
        if dynamic is not None and source is not None:
            view = pad.view(part)
            dynamic.copy_(view.as_packed(view.cut_full(source)))
            dynamic.requires_grad_(source.requires_grad)
    pad.router.initialise_(None, generator)
    if learned_scales:
        pad.add_scales_()
    return pad.train(layer.training)
