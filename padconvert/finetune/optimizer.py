"""The optimizer of a fine-tune, and how its state follows a partition that repacks parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from padconvert.layers.pad import Moved, PadLayer
from padconvert.rewrite import pad_layers

#: what convolutions gained by in the study, see `expert_factor`
FASTER = 4.0


class OptimizerPolicy(Protocol):
    """What is read of a policy's `train:` block."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float | None: ...  # said once the policy is in force
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def expert_lr_scale(self) -> float | None: ...
    @property
    def router_lr_scale(self) -> float: ...
    @property
    def what(self) -> str: ...


def make_optimizer(model: nn.Module, train: OptimizerPolicy) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW. Groups: weights, dynamic ones (lr × `expert_factor`), then routers
    (lr × router_lr_scale) and scales without decay.

    A parameter that the source had frozen stays frozen; `what: converted` trains the converted layers alone.
    """
    layers = list(pad_layers(model).values())
    routers = _unique([p for layer in layers if layer.router is not None for p in layer.router.parameters()])
    scales = [layer.scale_logit for layer in layers if layer.scale_logit is not None]
    normalised = normalised_convolutions(model)
    dynamic = {
        id(p): expert_factor(train, normalised=layer in normalised)
        for layer in layers
        for part in layer.parts
        if (p := getattr(layer, f"{part}_dynamic")) is not None
    }
    apart = {id(p) for p in [*routers, *scales]}
    pool: Sequence[nn.Module] = layers if train.what == "converted" else [model]
    weights = _unique([p for module in pool for p in module.parameters() if p.requires_grad and id(p) not in apart])
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if id(p) not in dynamic], "factor": 1.0, "weight_decay": train.weight_decay},
        *(
            {
                "params": [p for p in weights if dynamic.get(id(p)) == factor],
                "factor": factor,
                "weight_decay": train.weight_decay,
            }
            for factor in sorted(set(dynamic.values()))
        ),
        {"params": routers, "factor": train.router_lr_scale, "weight_decay": 0.0},
        {"params": scales, "factor": 1.0, "weight_decay": 0.0},
    ]
    assert train.lr is not None, "a plan's policy says it"
    if train.optimizer == "adamw":
        # one pass over each tensor; there is none for complex numbers
        fused = all(p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=train.lr, fused=fused, foreach=False)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, foreach=False)


def expert_factor(train: OptimizerPolicy, *, normalised: bool) -> float:
    """Learning rate of a layer's dynamic entries over that of static ones. Where the policy leaves it open it is 4 with
    AdamW for a convolution that BatchNorm follows (`normalised`: the size of its weights then does not matter), by
    which those gained in docs/results.md, and 1 for all others."""
    if train.expert_lr_scale is not None:
        return train.expert_lr_scale
    return FASTER if normalised and train.optimizer == "adamw" else 1.0


def normalised_convolutions(model: nn.Module) -> set[nn.Module]:
    """The converted convolutions that a BatchNorm of as many channels follows, in the order that modules have."""
    inside = {part for layer in pad_layers(model).values() for part in layer.modules() if part is not layer}
    leaves = [
        module
        for module in model.modules()
        if isinstance(module, PadLayer) or (module not in inside and not any(module.children()))
    ]
    return {
        layer
        for layer, after in pairwise(leaves)
        if isinstance(layer, PadLayer) and isinstance(after, _BatchNorm) and _is_normalised(layer, after)
    }


def _is_normalised(layer: PadLayer, after: _BatchNorm) -> bool:
    return len(layer.weight_shape) > 2 and after.num_features == layer.weight_shape[0]


def _unique(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def follow_(optimizer: torch.optim.Optimizer, moved: Sequence[Moved]) -> None:
    """Follow repacked parameters: surviving entries keep their momentum, newly static ones start without."""
    groups = [group["params"] for group in optimizer.param_groups]
    trained = {id(p) for group in groups for p in group}
    for move in moved:
        group, place = _held(move.old, groups)
        if place is not None and move.new is not None:
            group[place] = move.new
        elif place is not None:
            del group[place]
        elif move.new is not None and move.new.requires_grad and (move.old is None or id(move.old) in trained):
            groups[0].append(move.new)  # entries that are the first of their layer to turn static
        state = optimizer.state.pop(move.old, None) if move.old is not None else None
        if state is not None and move.new is not None:
            assert move.old is not None
            optimizer.state[move.new] = {key: _moved(value, move.old, move.new, move) for key, value in state.items()}


def _held(
    parameter: nn.Parameter | None, groups: Sequence[list[nn.Parameter]]
) -> tuple[list[nn.Parameter], int | None]:
    """The group that holds a parameter, and its place there; None where none does."""
    for group in groups:
        for place, each in enumerate(group):
            if each is parameter:
                return group, place
    return groups[0], None


def _moved(value: Any, old: nn.Parameter, new: nn.Parameter, move: Moved) -> Any:
    """A state tensor of the parameter's shape moves as the parameter did; a step count stays."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    moved = torch.zeros_like(new, dtype=value.dtype)
    return moved.index_copy(move.dim, move.to, value.index_select(move.dim, move.frm))
