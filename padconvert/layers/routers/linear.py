"""The default router: standardise, one linear layer, softmax (τ = 1 throughout).

With data it is set by k-means of the layer's own pooled inputs, so that experts see different samples from the
first step; without data by a seeded random projection. Since all experts are equal at upcycling, either keeps
the function.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from padconvert.layers.kmeans import balancing_bias, kmeans, sharpness, usual_top_probability
from padconvert.layers.routers import RouterModule


class Router(RouterModule):
    """π = softmax(A (x − mean) / deviation + b): [..., C] → [..., K] in fp32."""

    mean: Tensor | None
    deviation: Tensor | None

    def __init__(self, channels: int, num_experts: int, top_k: int = 0) -> None:
        super().__init__(channels, num_experts, top_k)
        self.weight = nn.Parameter(torch.zeros(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("mean", None)
        self.register_buffer("deviation", None)

    @staticmethod
    def tensor_shapes(channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (num_experts, channels), "bias": (num_experts,)}

    def forward(self, pooled: Tensor) -> Tensor:
        if self.mean is not None and self.deviation is not None:
            pooled = (pooled - self.mean) / self.deviation
        weight, bias = self.weight.to(pooled.dtype), self.bias.to(pooled.dtype)
        return self.share(nn.functional.linear(pooled, weight, bias))

    @torch.no_grad()
    def initialise_(self, pooled_NC: Tensor | None, generator: Generator, top_probability: float | None = None) -> None:
        """Set by k-means of `pooled_NC`, with top-k so that experts are chosen equally often; or at random (scale 1/√C)
        without it."""
        if pooled_NC is None:
            noise = torch.randn(self.weight.shape, generator=generator) / self.weight.shape[1] ** 0.5
            self.weight.copy_(noise)
            self.bias.zero_()
            return
        pooled_NC = pooled_NC.double().cpu()
        mean_C = pooled_NC.mean(0)
        deviation_C = pooled_NC.std(0, unbiased=False)
        deviation_C = torch.where(deviation_C > 1e-6 * deviation_C.max().clamp_min(1e-30), deviation_C, 1.0)
        standard_NC = (pooled_NC - mean_C) / deviation_C
        centre_KC = kmeans(standard_NC, self.weight.shape[0], generator)
        # softmax over −‖z − c‖²/2 up to a sharpness; ‖z‖² is the same for all experts and drops out
        weight_KC, bias_K = centre_KC, -centre_KC.square().sum(1) / 2
        logits_NK = standard_NC @ weight_KC.T + bias_K
        if self.top_k:
            bias_K = bias_K + balancing_bias(logits_NK, self.top_k)
        wanted = usual_top_probability(len(bias_K), self.top_k) if top_probability is None else top_probability
        scale = sharpness(standard_NC @ weight_KC.T + bias_K, wanted)
        self.weight.copy_(scale * weight_KC)
        self.bias.copy_(scale * bias_K)
        self.mean = mean_C.to(self.weight)
        self.deviation = deviation_C.to(self.weight)

    def anneal_(self, progress: float, start: float) -> None:
        """Nothing: its temperature is 1 throughout."""
        del progress, start

    @torch.no_grad()
    def fold_(self) -> None:
        """Standardisation into the linear layer: A/dev · x + (b − A mean/dev)."""
        if self.mean is None or self.deviation is None:
            return
        weight = self.weight.double() / self.deviation.double()
        self.bias.copy_(self.bias.double() - weight @ self.mean.double())
        self.weight.copy_(weight)
        self.mean = None
        self.deviation = None
