"""Converted layers and networks to be timed: experts unequal, partitioned, folded unless they are to be trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import padconvert
from padconvert.contenders import make_unequal_
from padconvert.fold import fold_
from padconvert.layers.build import upcycle
from padconvert.layers.conv import PadConv2d
from padconvert.layers.ffn import join_groups_
from padconvert.partition import Partitioner
from padconvert.policy import Resolved, load_policy
from padconvert.rewrite import rewrite_
from padconvert.words import Granularity, Place, Routing

EXPERTS, RATIO = 4, 0.3
MOE_EXPERTS, TOP_K, MOE_RATIO = 8, 2, 0.5


def policy(granularity: str, ratio: float = RATIO) -> Resolved:
    overrides = {"granularity": granularity, "dynamic_ratio": ratio, "num_experts": EXPERTS}
    return load_policy(preset="paper", overrides={f"defaults.{key}": value for key, value in overrides.items()})


def network(
    source: nn.Module, inputs: Tensor, granularity: str, *, ratio: float = RATIO, fold: bool = True
) -> nn.Module:
    """The converted network, K = 4, convolutions alone; `ratio` 1 is the fully dynamic one."""
    plan = padconvert.plan(source, policy(granularity, ratio), inputs=inputs, route="data-free")
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    make_unequal_(model)
    if ratio < 1:
        Partitioner(model, plan).round_(1, [])
    return fold_(model) if fold else model


def convolution(source: nn.Conv2d, granularity: str, ratio: float = RATIO) -> nn.Sequential:
    """One converted layer, in a container as a network has it; which units are dynamic is drawn."""
    layer = upcycle(
        source, num_experts=EXPERTS, granularity=Granularity(granularity), router="linear", routing=Routing.MAP,
        learned_scales=False, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert isinstance(layer, PadConv2d)
    model = nn.Sequential(layer)
    make_unequal_(model)
    for part in layer.parts:
        units = layer.view(part).units
        mask = drawn(units, ratio).to(source.weight.device)
        layer.partition_(part, mask, torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64))
    fold_(model)
    return model.eval()


def drawn(units: int, ratio: float) -> Tensor:
    """bool [units] with ⌊ratio · units + ½⌋ of them True, and neither none nor all."""
    count = min(max(int(ratio * units + 0.5), 1), max(units - 1, 1))
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    return torch.zeros(units, dtype=torch.bool).index_fill(0, order[:count], True)


class Ffn(nn.Module):
    """A transformer's feed-forward block: down(gelu(up(x))), or down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False) if gated else None
        self.up = nn.Linear(width, hidden, bias=not gated)
        self.down = nn.Linear(hidden, width, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        else:
            out = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out

    @property
    def names(self) -> list[str]:
        return ["up", "down"] if self.gate is None else ["gate", "up", "down"]


def mixture(source: Ffn, ratio: float = MOE_RATIO) -> Ffn:
    """The block as a mixture of experts by hidden units (`neuron`), E = 8, top-2."""
    made = copy.deepcopy(source)
    for i, name in enumerate(source.names):
        place = Place.LAST if name == "down" else Place.PEER if i else Place.FIRST
        member = upcycle(
            getattr(source, name), num_experts=MOE_EXPERTS, granularity=Granularity.NEURON, router="linear",
            routing=Routing.TOKEN, learned_scales=False, generator=torch.Generator().manual_seed(0), top_k=TOP_K,
            group=source.names[0], place=place,
        )  # fmt: skip
        setattr(made, name, member)
    join_groups_(made)
    make_unequal_(made)
    mean = torch.full((MOE_EXPERTS,), 1 / MOE_EXPERTS, dtype=torch.float64)
    for name in source.names:
        member = getattr(made, name)
        for part in member.unit_parts:
            mask = drawn(member.view(part).units, ratio).to(source.up.weight.device)
            member.partition_(part, mask, mean)
    fold_(made)
    return made.eval()
