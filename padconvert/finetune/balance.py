"""Two losses that keep top-k routers useful, from what they decided in a forward; see `layers.collecting`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from padconvert.layers.collecting import Note


class BalancePolicy(Protocol):
    """What is read of a policy's `train:` block."""

    @property
    def balance_weight(self) -> float: ...
    @property
    def z_weight(self) -> float: ...


def balancing_loss(notes: Sequence[Note], policy: BalancePolicy) -> Tensor | None:
    """The weighted sum of both losses, averaged over the calls of top-k routers; None where there is none."""
    counted = [note for note in notes if note.router.top_k and len(note.logits_TK)]
    weights = (policy.balance_weight, policy.z_weight)
    if not counted or not any(weights):
        return None
    each = [weights[0] * load_balance(note) + weights[1] * z_loss(note) for note in counted]
    return torch.stack(each).mean()


def load_balance(note: Note) -> Tensor:
    """K · Σ_k f_k P_k: f_k the share of choices that fell on expert k, P_k its mean probability (Fedus et al., 2022,
    eq. 4). 1 where all experts are used alike, K where one is used alone and for certain."""
    chosen_K = (note.routing_TK > 0).to(note.logits_TK.dtype).mean(0)
    share_K = chosen_K / chosen_K.sum()
    probability_K = note.logits_TK.softmax(-1).mean(0)
    return note.logits_TK.shape[-1] * (share_K * probability_K).sum()


def z_loss(note: Note) -> Tensor:
    """The mean squared log-sum-exp of the logits, which keeps them small (Zoph et al., 2022, eq. 5)."""
    return note.logits_TK.logsumexp(-1).square().mean()
