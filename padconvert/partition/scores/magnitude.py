"""`magnitude`: |W_i|, for a unit the mean over its entries. Needs no data: the score of the data-free route.

Unlike the loss changes it has no sign that could cancel, so a unit averages absolute values.
"""

from __future__ import annotations

from torch import Tensor

from padconvert.partition.scores import Evidence, Need

NEEDS = Need.WEIGHTS


def contribution(evidence: Evidence) -> Tensor:
    return evidence.mean_US.abs().mean(-1)


def finish(total: Tensor, count: int) -> Tensor:
    return total / count
