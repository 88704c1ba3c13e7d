"""Seeded k-means of a layer's pooled inputs, and the sharpness that turns distances into routing weights."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def kmeans(points_NC: Tensor, clusters: int, generator: Generator, rounds: int = 25) -> Tensor:
    """Centres [clusters, C] by Lloyd's algorithm from a k-means++ start. Deterministic for a generator's state.

    Fewer distinct points than clusters give repeated centres, never an error.
    """
    centre_KC = _spread_start(points_NC, clusters, generator)
    for _ in range(rounds):
        nearest_N = torch.cdist(points_NC, centre_KC).argmin(1)
        member_NK = torch.nn.functional.one_hot(nearest_N, clusters).to(points_NC.dtype)
        count_K = member_NK.sum(0)
        moved_KC = member_NK.T @ points_NC / count_K.clamp_min(1)[:, None]
        # an empty cluster keeps its centre
        moved_KC = torch.where(count_K[:, None] > 0, moved_KC, centre_KC)
        if torch.equal(moved_KC, centre_KC):
            break
        centre_KC = moved_KC
    return centre_KC


def _spread_start(points_NC: Tensor, clusters: int, generator: Generator) -> Tensor:
    """k-means++: each further centre is drawn with probability ∝ squared distance to the nearest one."""
    first = int(torch.randint(len(points_NC), (1,), generator=generator))
    chosen = [first]
    distance_N = (points_NC - points_NC[first]).square().sum(1)
    for _ in range(clusters - 1):
        weight_N = distance_N if float(distance_N.sum()) > 0 else torch.ones_like(distance_N)
        chosen.append(int(torch.multinomial(weight_N, 1, generator=generator)))
        distance_N = torch.minimum(distance_N, (points_NC - points_NC[chosen[-1]]).square().sum(1))
    return points_NC[chosen]


def sharpness(logit_NK: Tensor, top_probability: float, highest: float = 1e4) -> float:
    """The factor s for which softmax(s · logits) has a mean top probability of `top_probability`.

    Where no factor reaches it (all logits equal), the search ends at 1.
    """

    def top(scale: float) -> float:
        return float(torch.softmax(scale * logit_NK, dim=-1).amax(-1).mean())

    if top(highest) < top_probability:
        return 1.0
    low, high = 0.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if top(middle) < top_probability else (low, middle)
    return high
