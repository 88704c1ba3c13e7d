"""The paper's router: linear (C → max(4, C/4)), ReLU, linear (→ K), softmax(·/τ).

τ starts high (near-uniform routing) and is annealed to 1 within the warm-up, counted in steps.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from padconvert.layers.routers import RouterModule


class Router(RouterModule):
    """π = softmax(expand(relu(reduce(x))) / τ): [..., C] → [..., K] in fp32."""

    temperature: Tensor | None

    def __init__(self, channels: int, num_experts: int, top_k: int = 0) -> None:
        super().__init__(channels, num_experts, top_k)
        hidden = max(4, channels // 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, num_experts)
        self.register_buffer("temperature", None)

    @staticmethod
    def tensor_shapes(channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        hidden = max(4, channels // 4)
        return {
            "reduce.weight": (hidden, channels),
            "reduce.bias": (hidden,),
            "expand.weight": (num_experts, hidden),
            "expand.bias": (num_experts,),
        }

    def forward(self, pooled: Tensor) -> Tensor:
        linear = nn.functional.linear
        weights = (self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)
        reduce_weight, reduce_bias, expand_weight, expand_bias = (w.to(pooled.dtype) for w in weights)
        logits = linear(torch.relu(linear(pooled, reduce_weight, reduce_bias)), expand_weight, expand_bias)
        return self.share(logits if self.temperature is None else logits / self.temperature)

    @torch.no_grad()
    def initialise_(self, pooled_NC: Tensor | None, generator: Generator, top_probability: float | None = None) -> None:
        """Seeded Kaiming weights, zero biases; the inputs are not needed."""
        del pooled_NC, top_probability
        for layer in (self.reduce, self.expand):
            bound = math.sqrt(6 / layer.in_features)
            layer.weight.copy_((torch.rand(layer.weight.shape, generator=generator) * 2 - 1) * bound)
            layer.bias.zero_()

    def anneal_(self, progress: float, start: float) -> None:
        """τ falls linearly from `start` (at 0) to 1 (at 1 and after)."""
        value = start + (1 - start) * min(max(progress, 0.0), 1.0)
        self.temperature = torch.tensor(value, device=self.expand.weight.device)

    @torch.no_grad()
    def fold_(self) -> None:
        """τ into the last linear layer."""
        if self.temperature is not None:
            self.expand.weight.div_(self.temperature)
            self.expand.bias.div_(self.temperature)
            self.temperature = None
