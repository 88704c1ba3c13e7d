"""`fisher`: the mean over samples of the squared loss change of each."""

from __future__ import annotations

from torch import Tensor

from padconvert.partition.scores import Evidence, Need

NEEDS = Need.SAMPLE_GRADIENTS


def contribution(evidence: Evidence) -> Tensor:
    return evidence.change_U().square()


def finish(total: Tensor, count: int) -> Tensor:
    return total / count
