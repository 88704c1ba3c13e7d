"""Which units stay dynamic: exact counts over one ranking, ties by the lowest index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: entries gone through at a time: few enough to stay in the cache
_PIECE = 2**17
_SAMPLE = 2**15
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_in_layer(score_U: Tensor, count: int) -> Tensor:
    """bool [U], True for the `count` highest scores; of equal ones the lowest index stays."""
    score = score_U.detach().cpu().numpy()
    kept = np.zeros(len(score), dtype=np.bool_)
    if count:
        # one selection, not a sort: its indices alone would take more memory than the scores
        lowest = np.partition(score, len(score) - count)[len(score) - count]
        np.greater(score, lowest, out=kept)
        kept[np.flatnonzero(score == lowest)[: count - int(np.count_nonzero(kept))]] = True
    return torch.from_numpy(kept)


def keep_largest(values: Tensor, count: int) -> Tensor:
    """The same for single entries that are ranked by |value| alone, as a bitmask: uint8 [⌈n/8⌉], little bit order.

    `values` are gone through in pieces, in their order; no score of all of them is held.
    """
    pieces = _Pieces(values)
    if not 0 < count < values.numel():
        fill = bool(count)
        bits = [np.packbits(np.full(len(piece), fill), bitorder="little") for piece in pieces]
        return torch.from_numpy(np.concatenate(bits) if bits else np.zeros(0, np.uint8))
    lowest, ties = _lowest_kept(pieces, count)
    bits = []
    for piece in pieces:
        kept = piece > lowest
        if ties:
            equal = np.flatnonzero(piece == lowest)[:ties]
            kept[equal] = True
            ties -= len(equal)
        bits.append(np.packbits(kept, bitorder="little"))
    return torch.from_numpy(np.concatenate(bits))


def _lowest_kept(pieces: _Pieces, count: int) -> tuple[Any, int]:
    """(the `count`-th largest |value|, how many entries that have it are kept).

    A sample says between which bounds it lies almost certainly; only what lies there is held and selected from.
    """
    for low, high in (_bounds(pieces, count), pieces.ends):
        above, between = 0, []
        for piece in pieces:
            above += int(np.count_nonzero(piece > high))
            between.append(np.compress((piece >= low) & (piece <= high), piece))
        found = np.concatenate(between)
        if above < count <= above + len(found):
            place = len(found) - (count - above)
            lowest = np.partition(found, place)[place]
            return lowest, count - above - int(np.count_nonzero(found > lowest))
    raise AssertionError("every |value| lies between the ends")


def _bounds(pieces: _Pieces, count: int) -> tuple[int, int]:
    sample = np.sort(pieces.sample())
    place = len(sample) * (1 - count / pieces.total)
    slack = 4 * len(sample) ** 0.5
    low, high = max(int(place - slack), 0), min(int(place + slack), len(sample) - 1)
    lowest, highest = pieces.ends
    return sample[low] if low else lowest, sample[high] if high < len(sample) - 1 else highest


class _Pieces:
    """The ranks of a tensor's entries in row-major order, `_PIECE` at a time: a multiple of 8 but for the last.

    A rank is the bits of |value| read as an integer, which rises as |value| does, whatever the precision.
    """

    def __init__(self, values: Tensor) -> None:
        plain = values.detach().reshape(-1).cpu()
        self.flat: Any = plain.view(_WHOLE[plain.element_size()]).numpy()
        self.total = len(self.flat)
        self.largest = np.iinfo(self.flat.dtype).max  # all bits but the sign

    @property
    def ends(self) -> tuple[int, int]:
        """No rank lies outside."""
        return 0, self.largest

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, self.total, _PIECE):
            yield self.flat[begin : begin + _PIECE] & self.largest

    def sample(self) -> Any:
        # an odd stride meets every column of a row of even length
        return self.flat[:: self.total // _SAMPLE | 1] & self.largest


def keep_across_layers(scores: list[Tensor], sizes: list[int], totals: list[int], entries: int) -> list[Tensor]:
    """One ranking over the still-dynamic units of several layers: a bool [U] for each layer.

    `sizes` are the entries of a layer's unit, `totals` its number of units, static ones included. The kept units
    hold `entries` entries (within half a unit where units have more than one). Every layer keeps its best unit and
    gives up its worst one if it has no static unit yet, so that none is left with an empty or a full dynamic_mask.
    """
    held = [_with_ends(score, total) for score, total in zip(scores, totals, strict=True)]
    size = torch.cat([torch.full((len(score),), n) for score, n in zip(scores, sizes, strict=True)])
    order = torch.sort(torch.cat(held), descending=True, stable=True).indices
    reached = size[order].cumsum(0)
    nearest = int((reached - entries).abs().argmin()) + 1 if len(reached) else 0
    forced = len(scores)
    free = int(torch.isneginf(torch.cat(held)).sum())
    kept = min(max(nearest, forced), len(order) - free)
    mask = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:kept], True)
    ends = list(itertools.accumulate(len(score) for score in scores))
    return list(torch.tensor_split(mask, ends[:-1]))


def _with_ends(score_U: Tensor, total: int) -> Tensor:
    """The layer's best unit first in any ranking, its worst one last where nothing of it is static yet."""
    order = torch.sort(score_U, descending=True, stable=True).indices
    held = score_U.clone()
    if len(score_U) == total:
        held[order[-1]] = -torch.inf
    held[order[0]] = torch.inf
    return held
