"""The optimizer of a fine-tune, and how its state follows a partition that repacks parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from padconvert.layers.pad import Joined, Moved
from padconvert.rewrite import pad_layers


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
    def expert_lr_scale(self) -> float: ...
    @property
    def router_lr_scale(self) -> float: ...
    @property
    def what(self) -> str: ...


def make_optimizer(model: nn.Module, train: OptimizerPolicy) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW. Groups: weights, dynamic ones (lr × expert_lr_scale), then routers
    (lr × router_lr_scale) and scales without decay.

    A parameter that the source had frozen stays frozen; `what: converted` trains the converted layers alone.
    """
    layers = list(pad_layers(model).values())
    routers = _unique([p for layer in layers if layer.router is not None for p in layer.router.parameters()])
    scales = [layer.scale_logit for layer in layers if layer.scale_logit is not None]
    dynamic = {
        id(p) for layer in layers for part in layer.parts if (p := getattr(layer, f"{part}_dynamic")) is not None
    }
    apart = {id(p) for p in [*routers, *scales]}
    pool: Sequence[nn.Module] = layers if train.what == "converted" else [model]
    weights = _unique([p for module in pool for p in module.parameters() if p.requires_grad and id(p) not in apart])
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if id(p) not in dynamic], "factor": 1.0, "weight_decay": train.weight_decay},
        {
            "params": [p for p in weights if id(p) in dynamic],
            "factor": train.expert_lr_scale,
            "weight_decay": train.weight_decay,
        },
        {"params": routers, "factor": train.router_lr_scale, "weight_decay": 0.0},
        {"params": scales, "factor": 1.0, "weight_decay": 0.0},
    ]
    assert train.lr is not None, "a plan's policy says it"
    if train.optimizer == "adamw":
        # one pass over each tensor; there is none for complex numbers
        fused = all(p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=train.lr, fused=fused, foreach=False)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, foreach=False)


def _unique(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def follow_(optimizer: torch.optim.Optimizer, moved: Sequence[Moved]) -> None:
    """Follow repacked parameters: surviving entries keep their state, newly static ones take their experts'.

    Without it AdamW, whose correction for a young state counts the parameter's steps, would move them up to six times
    as far as the others for a hundred steps.
    """
    weights, experts = (group["params"] for group in optimizer.param_groups[:2])
    trained = {id(p) for p in (*weights, *experts)}
    for move in moved:
        group, place = _held(move.old, (weights, experts))
        if place is not None and move.new is not None:
            group[place] = move.new
        elif place is not None:
            del group[place]
        elif move.new is not None and move.new.requires_grad and (move.old is None or id(move.old) in trained):
            weights.append(move.new)  # entries that are the first of their layer to turn static
        state = optimizer.state.pop(move.old, {}) if move.old is not None else {}
        joined = {} if move.joined is None else optimizer.state.get(move.joined.experts, {})
        if move.new is not None and (state or joined):
            optimizer.state[move.new] = {
                key: _moved(key, state.get(key), joined.get(key), move) for key in {**joined, **state}
            }


def _held(
    parameter: nn.Parameter | None, groups: Sequence[list[nn.Parameter]]
) -> tuple[list[nn.Parameter], int | None]:
    """The group that holds a parameter, and its place there; None where none does."""
    for group in groups:
        for place, each in enumerate(group):
            if each is parameter:
                return group, place
    return groups[0], None


def _moved(key: str, own: Any, experts: Any, move: Moved) -> Any:
    """State `key` of the new parameter, of the old one's `own` and of the `experts`' that joined it. What has not the
    parameter's shape, as a step count, stays."""
    joined = move.joined
    first, of = (own, move.old) if own is not None or joined is None else (experts, joined.experts)
    assert move.new is not None
    if of is None or not isinstance(first, Tensor):
        return first
    if first.shape != of.shape:
        return first.clone()
    moved = torch.zeros_like(move.new, dtype=first.dtype)
    if own is not None:
        moved.index_copy_(move.dim, move.to, own.index_select(move.dim, move.frm))
    if experts is not None and joined is not None:
        moved.index_copy_(move.dim, joined.to, _joined(key, experts, joined))
    return moved


def _joined(key: str, experts: Tensor, joined: Joined) -> Tensor:
    """The state of static entries of that of their experts: means of gradients add up as gradients do; the root mean
    square of a sum is at most the sum of theirs."""
    one_each = experts.index_select(joined.dim, joined.frm)
    if key == "exp_avg_sq":
        return one_each.sqrt().sum(0).mul(joined.scale).square()
    return one_each.sum(0).mul(joined.scale)
