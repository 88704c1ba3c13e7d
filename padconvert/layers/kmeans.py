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


def separation(points_NC: Tensor, clusters: int, generator: Generator) -> float:
    """How far points fall into groups, beyond what one cloud of their covariance would: 0 for a normal cloud, 1 where
    every point lies on its group's centre. Channels count alike, whatever their scale.

    (S − S₀) / (1 − S₀), with S the share of the points' variance that `clusters` k-means centres explain, and S₀ the
    same of as many normal points with their covariance: the idea of the gap statistic (Tibshirani et al., 2001), as a
    share of what is left to explain. Below 0 by chance, or where the cloud is rounder than normal.
    """
    points_NC = points_NC.double()
    deviation_C = points_NC.std(0, unbiased=False)
    points_NC = (points_NC - points_NC.mean(0)) / torch.where(deviation_C > 0, deviation_C, 1.0)
    value_C, vector_CC = torch.linalg.eigh(points_NC.T @ points_NC / len(points_NC))
    # an eigenvector's sign is the library's choice; that of a symmetric square root is not
    root_CC = (vector_CC * value_C.clamp_min(0).sqrt()) @ vector_CC.T
    cloud_NC = torch.randn(points_NC.shape, dtype=torch.float64, generator=generator) @ root_CC
    found, chance = (_explained(each, clusters, generator) for each in (points_NC, cloud_NC))
    return (found - chance) / (1 - chance) if chance < 1 else 0.0


def _explained(points_NC: Tensor, clusters: int, generator: Generator, starts: int = 3) -> float:
    """The share of the variance that the best of some k-means explains."""
    total = float(points_NC.square().sum())
    if total == 0:
        return 0.0
    centred = [torch.cdist(points_NC, kmeans(points_NC, clusters, generator)).amin(1) for _ in range(starts)]
    return 1 - min(float(distance_N.square().sum()) for distance_N in centred) / total


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


#: how sure of an expert a first routing is where all are mixed, from 0, all alike, to 1, one alone. Surer ones (0.73)
#: gained a little more where inputs come from several domains, and cost a published network more than a point
#: (docs/results.md)
SURENESS = 1 / 3
#: the mean top probability where some are chosen (top-k)
OF_CHOSEN = 0.8


def usual_top_probability(num_experts: int, top_k: int = 0) -> float:
    """The mean highest weight of K experts in a first routing: 1/K + s · (1 − 1/K), s = `SURENESS`; or `OF_CHOSEN`."""
    return OF_CHOSEN if top_k else (1 + SURENESS * (num_experts - 1)) / num_experts


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
