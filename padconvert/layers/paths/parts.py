"""What the paths compute with: the packed parts in the mixing dtype, mixed for every sample, put in their places.

No path builds K full copies of a weight. Since Σπ = 1 only the dynamic units are mixed; the static ones are placed.

Legend of names: B samples, K experts, U = D + N units, D dynamic, N static, S entries of a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.packed import Units
from padconvert.layers.placing import placed, reordered

if TYPE_CHECKING:
    from padconvert.layers.pad import PadLayer


def static_part(layer: PadLayer, part: str) -> Tensor | None:
    """λ_s W_s, [N, S] in the mixing dtype; None where nothing is static."""
    static = getattr(layer, f"{part}_static")
    if static is None:
        return None
    cut_NS = layer.view(part).cut_packed(static).to(layer.mixing_dtype)
    return cut_NS if layer.scale_logit is None else cut_NS * layer.scales()[0]


def dynamic_part(layer: PadLayer, part: str) -> Tensor | None:
    """D without its scale, [K, D, S] in the mixing dtype; None where nothing is dynamic."""
    dynamic = getattr(layer, f"{part}_dynamic")
    return None if dynamic is None else layer.view(part).cut_packed(dynamic).to(layer.mixing_dtype)


def scaled(value: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """λ · value; the stored value itself where λ is folded in."""
    if isinstance(scale, float):
        return value.to(dtype)
    return (value.to(scale.dtype) * scale).to(dtype)


def mix(layer: PadLayer, dynamic_KDS: Tensor, routing_BK: Tensor) -> Tensor:
    """λ_d Σ_k π_k(b) D_k for every sample, [B, D, S] in the mixing dtype."""
    share_BK = routing_BK.to(dynamic_KDS.dtype)
    if layer.scale_logit is not None:
        share_BK = share_BK * layer.scales()[1]
    with without_autocast(dynamic_KDS):
        return (share_BK @ dynamic_KDS.flatten(1)).view(routing_BK.shape[0], *dynamic_KDS.shape[1:])


def mixed(layer: PadLayer, part: str, routing_BK: Tensor) -> Tensor:
    """W(b) for every sample: [B, *shape] in the mixing dtype."""
    static_NS, dynamic_KDS = static_part(layer, part), dynamic_part(layer, part)
    batch = routing_BK.shape[0]
    if dynamic_KDS is None:
        assert static_NS is not None
        whole_BUS = static_NS.expand(batch, -1, -1)
    elif static_NS is None:
        whole_BUS = mix(layer, dynamic_KDS, routing_BK)
    else:
        whole_BUS = placed(static_NS.expand(batch, -1, -1), mix(layer, dynamic_KDS, routing_BK), layer.units(part))
    return layer.view(part).as_full(whole_BUS)


def side_by_side(layer: PadLayer, part: str, routing_BK: Tensor) -> Tensor:
    """W(b) of rows for every sample, the static ones first: [B, N + D, *row] in the mixing dtype."""
    static_NS, dynamic_KDS = static_part(layer, part), dynamic_part(layer, part)
    assert static_NS is not None
    assert dynamic_KDS is not None
    batch = routing_BK.shape[0]
    both_BUS = torch.cat([static_NS.expand(batch, -1, -1), mix(layer, dynamic_KDS, routing_BK)], 1)
    return layer.view(part).as_full(both_BUS)


def ordered(packed: Tensor, units: Units) -> Tensor:
    """[B, N + D, …], the static units first, each unit in its place: [B, U, …]."""
    order = torch.cat([units.static, units.dynamic])
    return reordered(packed, order.argsort(), order, 1)
