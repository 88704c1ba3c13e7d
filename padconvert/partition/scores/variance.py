"""`variance`: Σ_k π̄_k (D_k,i − D̄_i)², how far the experts have come apart. Needs routing, no labels."""

from __future__ import annotations

from torch import Tensor

from padconvert.partition.scores import Evidence, Need

NEEDS = Need.ROUTING


def contribution(evidence: Evidence) -> Tensor:
    return (evidence.mean_routing_K[:, None, None] * evidence.apart_KUS().square()).sum(0).mean(-1)


def finish(total: Tensor, count: int) -> Tensor:
    return total / count
