"""`snip`: the paper's code, |∂L/∂m_i| of the dynamic part: |Σ_b ∂L/∂W_i(b) · λ_d Σ_k π_k(b) D_k,i|.

It measures removing an entry, not turning it static, and ranks worse than `taylor`; here for comparison.
"""

from __future__ import annotations

from torch import Tensor

from padconvert.partition.scores import Evidence, Need

NEEDS = Need.GRADIENT


def contribution(evidence: Evidence) -> Tensor:
    assert evidence.gradient_KUS is not None
    return (evidence.gradient_KUS * evidence.dynamic_KUS).sum((0, 2)) / evidence.dynamic_KUS.shape[-1]


def finish(total: Tensor, count: int) -> Tensor:
    return total.abs() / count
