"""`taylor` (default): |Σ_b ∂L/∂W_i(b) · λ_d (Σ_k π_k(b) D_k,i − Σ_k π̄_k D_k,i)|, the first-order loss change."""

from __future__ import annotations

from torch import Tensor

from padconvert.partition.scores import Evidence, Need

NEEDS = Need.GRADIENT


def contribution(evidence: Evidence) -> Tensor:
    return evidence.change_U()


def finish(total: Tensor, count: int) -> Tensor:
    return total.abs() / count
