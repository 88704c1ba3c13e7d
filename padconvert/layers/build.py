"""The two ways to a Pad layer: upcycle a trained static one, or build an empty one for a checkpoint's values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, assert_never, cast

import torch
from torch import nn

from padconvert.layers.conv import PadConv1d, PadConv2d, PadConv3d
from padconvert.layers.facts import CALL_OPTIONS, LayerFacts
from padconvert.layers.ffn import PadLinearMember
from padconvert.layers.linear import PadLinear
from padconvert.layers.pad import PadLayer
from padconvert.words import Granularity, Kind, Place, Routing

#: transformers' Conv1D, a linear layer that stores its weight as [in, out], is one too; its type has no name here
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
            return PadLinear(facts, device) if facts.place is Place.ALONE else PadLinearMember(facts, device)
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
    if facts.transposed:
        return _transposed_linear(facts, options["device"])
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


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, told by name, since nothing here imports transformers for it."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def _transposed_linear(facts: LayerFacts, device: torch.device | str) -> Static:
    from transformers.pytorch_utils import Conv1D

    rows, columns = facts.weight_shape
    with torch.device("meta"):
        layer = Conv1D(rows, columns)  # type: ignore[no-untyped-call]
    return cast(Static, layer.to(getattr(torch, facts.dtype)).to_empty(device=device))


def weight_of(layer: Static) -> torch.Tensor:
    """The weight as a Pad layer has it: [O, ...]."""
    return layer.weight.T if is_transposed(layer) else layer.weight


def facts_of_static(
    layer: Static,
    *,
    num_experts: int,
    granularity: Granularity,
    router: str,
    routing: Routing,
    top_k: int = 0,
    group: str = "",
    place: Place = Place.ALONE,
) -> LayerFacts:
    """The facts of a fully dynamic layer (κ = 1) in place of a trained static one."""
    has_bias = layer.bias is not None
    shape = tuple(weight_of(layer).shape)
    kind = kind_of(layer)
    facts = LayerFacts(
        kind=kind,
        granularity=granularity,
        num_experts=num_experts,
        weight_shape=shape,
        dtype=str(layer.weight.dtype).removeprefix("torch."),
        has_bias=has_bias,
        n_dynamic=0,
        n_bias_dynamic=0,
        router=router,
        routing=routing if kind is Kind.LINEAR else Routing.MAP,
        top_k=top_k,
        group=group,
        place=place,
        transposed=is_transposed(layer),
    )
    units = math.prod(shape) if granularity is Granularity.ELEMENT else shape[facts.unit_dim]
    facts = replace(facts, n_dynamic=units, n_bias_dynamic=shape[0] if has_bias and not facts.unit_dim else 0)
    if kind is Kind.LINEAR:
        return facts
    return replace(facts, **{name: getattr(layer, name) for name in CALL_OPTIONS})


def kind_of(layer: Static) -> Kind:
    if isinstance(layer, nn.Linear) or is_transposed(layer):
        return Kind.LINEAR
    match layer:
        case nn.Conv1d():
            return Kind.CONV1D
        case nn.Conv2d():
            return Kind.CONV2D
        case nn.Conv3d():
            return Kind.CONV3D
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
    top_k: int = 0,
    group: str = "",
    place: Place = Place.ALONE,
) -> PadLayer:
    """A fully dynamic layer that computes what the static one does: D_k = W for every k, scale_logit = 0.

    Any routing then gives W(b) = Σ_k π_k W = W. The router is seeded by `generator`. A member of a feed-forward block
    (`group`, `place`) is to be joined with the others before it is called; see `join_groups_`.
    """
    facts = facts_of_static(
        layer,
        num_experts=num_experts,
        granularity=granularity,
        router=router,
        routing=routing,
        top_k=top_k,
        group=group,
        place=place,
    )
    pad = build_layer(facts, layer.weight.device)
    for part in pad.parts:
        source = weight_of(layer) if part == "weight" else layer.bias
        assert source is not None
        _put(pad, part, source)
    if pad.router is not None:
        pad.router.initialise_(None, generator)
    if learned_scales:
        pad.add_scales_()
    return pad.train(layer.training)


def _put(pad: PadLayer, part: str, source: torch.Tensor) -> None:
    """A static tensor into a part whose units are all dynamic, or (a bias beside columns) all static."""
    view = pad.view(part)
    for name in (f"{part}_static", f"{part}_dynamic"):
        stored = getattr(pad, name)
        if stored is not None:
            stored.copy_(view.as_packed(view.cut_full(source)))
            stored.requires_grad_(source.requires_grad)
