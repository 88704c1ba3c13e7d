"""Which units stay dynamic: exact counts over one ranking, ties by the lowest index."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def keep_in_layer(score_U: Tensor, count: int) -> Tensor:
    """bool [U], True for the `count` highest scores; of equal ones the lowest index stays."""
    order = torch.sort(score_U, descending=True, stable=True).indices
    return torch.zeros(len(score_U), dtype=torch.bool).index_fill(0, order[:count], True)


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
