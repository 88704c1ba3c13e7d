"""How the routers of a trained model use their experts, on real data."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from padconvert.finetune.data.examples import Examples
from padconvert.finetune.objectives import dtype_of, forward
from padconvert.layers.collecting import Note, collecting
from padconvert.layers.routers import RouterModule
from padconvert.results import COLLAPSED, STARVED, RouterUse
from padconvert.rewrite import pad_layers
from padconvert.walk.quiet import evaluating

#: examples that the routers are watched on
SAMPLES = 1024
#: for each expert, below which nobody is called starved or collapsed
FEWEST_TOKENS = 10


def router_use(model: nn.Module, examples: Examples, batch_size: int, device: torch.device) -> tuple[RouterUse, ...]:
    """One record for every router of `model`, by the name of its layer, from the first `SAMPLES` examples in eval mode.

    Padding is no evidence. A layer that saw nothing is left out.
    """
    totals: dict[RouterModule, _Total] = defaultdict(_Total)
    with evaluating(model), torch.no_grad():
        for indices in torch.arange(min(SAMPLES, len(examples))).split(batch_size):
            with collecting() as notes:
                forward(model, examples.batch(indices).to(device, dtype_of(model)).inputs)
            for note in notes:
                totals[note.router].add(note)
    named = {layer.router: name for name, layer in pad_layers(model).items() if layer.router is not None}
    return tuple(total.use(named[router]) for router, total in totals.items() if total.tokens)


class _Total:
    """Sums over the calls of one router."""

    def __init__(self) -> None:
        self.tokens = 0
        self.entropy = 0.0
        self.used: Tensor | float = 0.0

    def add(self, note: Note) -> None:
        routing_TK = note.routing_TK.double().cpu()
        used_TK = (routing_TK > 0).double() / note.router.top_k if note.router.top_k else routing_TK
        self.tokens += len(routing_TK)
        self.used = self.used + used_TK.sum(0)
        self.entropy += float(torch.special.entr(routing_TK).sum())

    def use(self, name: str) -> RouterUse:
        assert isinstance(self.used, Tensor)
        share_K = self.used / self.used.sum()
        experts = len(share_K)
        balance = float(torch.special.entr(share_K).sum()) / math.log(experts)
        # how a handful of tokens is spread says nothing
        judged = self.tokens >= FEWEST_TOKENS * experts
        starved = int((share_K < STARVED / experts).sum()) if judged else 0
        return RouterUse(
            layer=name,
            usage=tuple(round(float(value), 6) for value in share_K),
            usage_entropy=balance,
            routing_entropy=self.entropy / self.tokens / math.log(experts),
            starved=starved,
            collapsed=judged and balance < COLLAPSED,
        )


def collapse_warnings(uses: tuple[RouterUse, ...]) -> list[str]:
    """One line where routers have collapsed, and one where experts starve; each names the first such layer."""
    lines = []
    collapsed = [use for use in uses if use.collapsed]
    if collapsed:
        lines.append(
            f"{len(collapsed)} of {len(uses)} routers have collapsed (the entropy of their experts' usage is below "
            f"{COLLAPSED} of the highest), first {collapsed[0].layer}: most experts are hardly used. "
            "Lower train.router_lr_scale, or raise train.balance_weight (where top_k is not 0)"
        )
    starved = [use for use in uses if use.starved and not use.collapsed]
    if starved:
        lines.append(
            f"{sum(use.starved for use in starved)} experts get less than {STARVED:.0%} of an even share, first "
            f"in {starved[0].layer}. Take fewer experts, or raise train.balance_weight (where top_k is not 0)"
        )
    return lines
