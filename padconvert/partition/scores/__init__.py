"""Scores: one file each, its name is its name in the policy. A score says what turning a unit static would change.

To add one, add a file with

* `NEEDS`: what it is computed from, a `Need`
* `contribution(evidence) -> [U]`: of one micro-batch (of one sample for `Need.SAMPLE_GRADIENTS`); these are summed
* `finish(total, count) -> [U]`: the score from the sum over `count` contributions; the lowest turn static first

A unit's entries are summed before an absolute value or a square, since that is the change of turning the whole
unit static, and divided by their number, so that units of different sizes can be ranked together.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, cast

from torch import Generator, Tensor


class Need(StrEnum):
    """What a score is computed from."""

    WEIGHTS = "weights"  # no data at all
    ROUTING = "routing"  # the mean routing weights: forward passes
    GRADIENT = "gradient"  # the loss gradient of whole micro-batches
    SAMPLE_GRADIENTS = "sample_gradients"  # the loss gradient of every single sample


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a score sees of one layer. K experts, U still-dynamic units of S entries each, all scaled by λ_d."""

    dynamic_KUS: Tensor
    mean_routing_K: Tensor
    generator: Generator
    gradient_KUS: Tensor | None = None  # ∂L/∂(λ_d D)

    @property
    def mean_US(self) -> Tensor:
        """Σ_k π̄_k D_k: the value that the unit would take as a static one."""
        return (self.mean_routing_K[:, None, None] * self.dynamic_KUS).sum(0)

    def apart_KUS(self) -> Tensor:
        """D_k − Σ_j π̄_j D_j, exactly zero where the experts are equal whatever π̄ was rounded to."""
        from_first = self.dynamic_KUS - self.dynamic_KUS[:1]
        return from_first - (self.mean_routing_K[:, None, None] * from_first).sum(0)

    def change_U(self) -> Tensor:
        """Σ_b ∂L/∂W_i(b) · λ_d (Σ_k π_k(b) D_k,i − Σ_k π̄_k D_k,i), summed over a unit's entries, over their number.

        Since ∂L/∂D_k,i = Σ_b π_k(b) ∂L/∂W_i(b) and Σ_k π_k = 1, it needs nothing but the gradient of D.
        """
        assert self.gradient_KUS is not None
        return (self.gradient_KUS * self.apart_KUS()).sum((0, 2)) / self.dynamic_KUS.shape[-1]


class Score(Protocol):
    NEEDS: Need

    def contribution(self, evidence: Evidence) -> Tensor: ...
    def finish(self, total: Tensor, count: int) -> Tensor: ...


def score_named(name: str) -> Score:
    """The score in the file `scores/NAME.py`. Raises ModuleNotFoundError for an unknown name."""
    return cast(Score, importlib.import_module(f"{__name__}.{name}"))
