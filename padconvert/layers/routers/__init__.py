"""Routers: one file each, its name is its name in the policy, its class is `Router`.

A router maps pooled inputs [..., C] to routing weights π [..., K] in fp32: non-negative, summing to 1 over K.
None has BatchNorm (it would crash at batch 1 in train mode). To add one, add a file with a class `Router` that has

* `Router(channels, num_experts)` and `forward(pooled) -> routing_weights`
* `tensor_shapes(channels, num_experts)`: its stored tensors after `fold_()`
* `initialise_(pooled_NC | None, generator)`: set from the layer's own inputs, or without data
* `anneal_(progress, start)`: temperature at a share `progress` of the warm-up
* `fold_()`: standardisation and temperature into the weights
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Generator, Tensor, nn


class RouterLike(Protocol):
    """What every router module offers beside `nn.Module`."""

    @staticmethod
    def tensor_shapes(channels: int, num_experts: int) -> dict[str, tuple[int, ...]]: ...

    def __call__(self, pooled: Tensor) -> Tensor: ...
    def initialise_(self, pooled_NC: Tensor | None, generator: Generator) -> None: ...
    def anneal_(self, progress: float, start: float) -> None: ...
    def fold_(self) -> None: ...


def router_class(name: str) -> type[nn.Module]:
    """The class of the router in the file `routers/NAME.py`. Raises ModuleNotFoundError for an unknown name."""
    return cast(type[nn.Module], importlib.import_module(f"{__name__}.{name}").Router)


def tensor_shapes(name: str, channels: int, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Names (relative to the router) and shapes of the tensors that a folded router stores."""
    return cast(type[RouterLike], router_class(name)).tensor_shapes(channels, num_experts)
