"""Routers: one file each, its name is its name in the policy, its class is `Router`.

A router maps pooled inputs [..., C] to routing weights π [..., K] in at least fp32: non-negative, summing to 1 over K.
None has BatchNorm (it would crash at batch 1 in train mode). To add one, add a file with a class `Router` made from
`RouterModule`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import cast

from torch import Generator, Tensor, nn


class RouterModule(nn.Module, ABC):
    """What every router offers. It is made by `Router(channels, num_experts)`."""

    @abstractmethod
    def __init__(self, channels: int, num_experts: int) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def tensor_shapes(channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors it stores once it is folded."""

    @abstractmethod
    def forward(self, pooled: Tensor) -> Tensor:
        """[..., C] → routing weights [..., K], in the dtype of `pooled`."""

    @abstractmethod
    def initialise_(self, pooled_NC: Tensor | None, generator: Generator) -> None:
        """Set from the layer's own inputs, or without data."""

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
