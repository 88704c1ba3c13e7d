"""Shared: the experts are one in memory, seen K times. Then W(b) = (Σ_k π_k(b)) W, and no copy of an expert is made.

The form in which an artefact that was never trained is held against its source: the router is called and its sum
counts, so a broken router shows. Not for training, which makes the experts differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from padconvert.layers.autocast import without_autocast
from padconvert.layers.paths.call import convolution

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv
    from padconvert.layers.linear import PadLinear
    from padconvert.layers.pad import PadLayer

#: entries that are put in their places at a time: few enough to stay in the cache, and a multiple of 8, so that each
#: piece begins on a whole byte of bits
_PIECE = 2**16


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    bias = expert(layer, "bias") if layer.has_bias else None
    out = convolution(layer, x, expert(layer, "weight"), bias, layer.groups)
    return _times(out, layer.route(x).sum(-1).reshape(-1, *(1,) * (layer.spatial + 1)))


def project(layer: PadLinear, x: Tensor) -> Tensor:
    """[..., C] → [..., O]."""
    bias = expert(layer, "bias").to(x.dtype) if layer.has_bias else None
    out = torch.nn.functional.linear(x, expert(layer, "weight").to(x.dtype), bias)
    total = layer.route(x).sum(-1)
    return _times(out, total.reshape(*total.shape, *(1,) * (out.dim() - total.dim())))


def _times(out: Tensor, total: Tensor) -> Tensor:
    with without_autocast(out):
        return (out * total).to(out.dtype)


def expert(layer: PadLayer, part: str) -> Tensor:
    """The one weight or bias that all experts are, in the layer's shape and the mixing dtype."""
    view = layer.view(part)
    static_NS, dynamic_KDS = layer.cut_part(part)
    if dynamic_KDS is None or static_NS is None:
        whole_US = static_NS if dynamic_KDS is None else dynamic_KDS[0]
        assert whole_US is not None
        return view.as_full(whole_US)
    dynamic_DS = dynamic_KDS[0]
    whole_US = static_NS.new_empty(view.units, view.size)
    if view.by_entry:
        bits = getattr(layer, "dynamic_bitmask" if part == "weight" else "bias_dynamic_bitmask")
        _place_entries_(whole_US[:, 0], static_NS[:, 0], dynamic_DS[:, 0], bits)
    else:
        units = layer.units(part)
        whole_US.index_copy_(0, units.static, static_NS)
        whole_US.index_copy_(0, units.dynamic, dynamic_DS)
    return view.as_full(whole_US)


def _place_entries_(whole_U: Tensor, static_N: Tensor, dynamic_D: Tensor, bits: Tensor) -> None:
    """Piece by piece: the indices of all entries at once would take more memory than the weight."""
    done = [0, 0]
    for begin in range(0, len(whole_U), _PIECE):
        piece_U = whole_U[begin : begin + _PIECE]
        packed = bits[begin // 8 : -(-(begin + len(piece_U)) // 8)].cpu().numpy()
        mask = np.unpackbits(packed, count=len(piece_U), bitorder="little").view(np.bool_)
        for kind, (part, where) in enumerate(((static_N, ~mask), (dynamic_D, mask))):
            index = torch.from_numpy(np.flatnonzero(where)).to(whole_U.device)
            piece_U.scatter_(0, index, part[done[kind] : done[kind] + len(index)])
            done[kind] += len(index)
