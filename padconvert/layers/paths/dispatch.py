"""Which expert computes which rows: sorted once a call, for all members of a block.

Legend of names: T tokens, J chosen experts of a token, K experts, N = T · J rows. Row t · J + j is what token t has of
its j-th choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The rows of one call, those of the first expert first: which they are, and whose. What is derived of them is
    computed where it is first asked for; on a GPU only `counts` waits for the device.
    """

    order_N: Tensor
    expert_N: Tensor
    counts_K: Tensor
    choices: int

    @staticmethod
    def of(chosen_TJ: Tensor, experts: int) -> Dispatch:
        chosen_N = chosen_TJ.flatten()
        expert_N, order_N = chosen_N.sort(stable=True)
        return Dispatch(order_N, expert_N, torch.bincount(chosen_N, minlength=experts), chosen_TJ.shape[1])

    @cached_property
    def inverse_N(self) -> Tensor:
        """Where each row went."""
        return self.order_N.argsort()

    @cached_property
    def token_N(self) -> Tensor:
        """The token of each sorted row."""
        return self.order_N.div(self.choices, rounding_mode="floor")

    @cached_property
    def ends_K(self) -> Tensor:
        """The sorted row after each expert's last, int32 as a grouped product takes it."""
        return self.counts_K.cumsum(0).int()

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each expert has."""
        found: list[int] = self.counts_K.tolist()
        return found

    def chosen(self, *sorted_N: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Every expert that was chosen, and its part of each of `sorted_N` (sorted rows, or values of them)."""
        for k, parts in enumerate(zip(*(value.split(self.counts) for value in sorted_N), strict=True)):
            if self.counts[k]:
                yield k, parts
