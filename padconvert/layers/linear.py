"""`PadLinear`: a partially dynamic linear layer, routed per token or per sequence."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from padconvert.layers.facts import LayerFacts
from padconvert.layers.pad import PadLayer
from padconvert.layers.padding import sequence_mean
from padconvert.layers.paths import project
from padconvert.words import Routing


class PadLinear(PadLayer):
    """y = W(b) x + bias(b). A token is what a linear layer sees at one position: the last dimension of its input."""

    def _copy_call_options(self, facts: LayerFacts) -> None:
        # parents read these
        self.out_features, self.in_features = facts.weight_shape
        self.transposed = facts.transposed
        if facts.transposed:
            self.nf, self.nx = facts.weight_shape

    @property
    def router_channels(self) -> int:
        return self.in_features

    def pooled(self, x: Tensor) -> Tensor:
        """`token`: the tokens themselves [..., C]. `sequence`: the mean over all real positions, [B, C]."""
        if self.routing is Routing.TOKEN or x.dim() <= 2:
            return x
        return sequence_mean(x)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., O]."""
        return project(self, x)

    def facts(self) -> LayerFacts:
        return dataclasses.replace(super().facts(), transposed=self.transposed)
