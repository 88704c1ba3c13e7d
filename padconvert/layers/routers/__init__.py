"""Routers: one file each, its name is its name in the policy, its class is `Router`.

A router maps pooled inputs [..., C] to routing weights π [..., K] in at least fp32: non-negative, summing to 1 over K.
None has BatchNorm (it would crash at batch 1 in train mode). To add one, add a file with a class `Router` made from
`RouterModule`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Generator, Tensor, nn

from padconvert.layers.collecting import note


class RouterModule(nn.Module, ABC):
    """What every router offers. It is made by `Router(channels, num_experts, top_k)`; a `forward` ends in `share`."""

    @abstractmethod
    def __init__(self, channels: int, num_experts: int, top_k: int = 0) -> None:
        super().__init__()
        self.top_k = top_k

    def share(self, logits: Tensor) -> Tensor:
        """Routing weights [..., K] from logits [..., K]: a softmax, over the `top_k` highest logits only if there is
        one, with zero for all other experts.

        In training the choice among experts is noisy, N(0, 1/K²) on the logits (Riquelme et al., 2021, §2.1; after
        Shazeer et al., 2017, eq. 4), so that close calls go either way and no expert starves.
        """
        if self.top_k:
            chosen_by = logits + torch.randn_like(logits) / logits.shape[-1] if self.training else logits
            top = chosen_by.topk(self.top_k, dim=-1)
            routing = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
        else:
            routing = torch.softmax(logits, dim=-1)
        note(self, logits, routing)
        return routing

    @staticmethod
    @abstractmethod
    def tensor_shapes(channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors it stores once it is folded."""

    @abstractmethod
    def forward(self, pooled: Tensor) -> Tensor:
        """[..., C] → routing weights [..., K], in the dtype of `pooled`."""

    @abstractmethod
    def initialise_(self, pooled_NC: Tensor | None, generator: Generator, top_probability: float | None = None) -> None:
        """Set from the layer's own inputs, or without data. `top_probability`: how sure it is of an expert at first,
        the mean over the inputs of the highest routing weight; None: `kmeans.usual_top_probability`."""

    @abstractmethod
    def anneal_(self, progress: float, start: float) -> None:
        """The temperature at a share `progress` of the warm-up; it begins at `start` and ends at 1."""

    @abstractmethod
    def fold_(self) -> None:
        """Standardisation and temperature into the weights."""


def router_class(name: str) -> type[RouterModule]:
    """The class of the router in the file `routers/NAME.py`. Raises ModuleNotFoundError for an unknown name."""
    return cast(type[RouterModule], importlib.import_module(f"{__name__}.{name}").Router)


def tensor_shapes(name: str, channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Names (relative to the router) and shapes of the tensors that a folded router stores."""
    return router_class(name).tensor_shapes(channels, num_experts)
