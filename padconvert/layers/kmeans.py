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


def balancing_bias(logits_NK: Tensor, top_k: int, rounds: int = 200) -> Tensor:
    """What to add to the logits [K] so that each of K experts is among the `top_k` highest for about as many points.

    Clusters differ in size, and an expert that few points choose learns from few. Each round lowers the bias of the
    experts with more than their share and raises the others' (Wang et al., 2024, "auxiliary-loss-free"), by less and
    less; the best of all rounds is taken.
    """
    count, experts = logits_NK.shape
    spread = logits_NK.std(unbiased=False)
    bias_K = torch.zeros(experts, dtype=logits_NK.dtype)
    best, least = bias_K, float("inf")
    for step in range(rounds):
        chosen = (logits_NK + bias_K).topk(top_k, dim=-1).indices
        share_K = torch.bincount(chosen.flatten(), minlength=experts).to(bias_K) / (count * top_k)
        uneven = float((share_K * experts - 1).abs().max())
        if uneven < least:
            best, least = bias_K, uneven
        rate = 0.5 * spread * (1 - step / rounds)
        bias_K = bias_K - rate * (share_K * experts - 1).clamp(-1, 1)
    return best


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
