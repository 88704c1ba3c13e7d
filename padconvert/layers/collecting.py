"""What routers decide, gathered beside a model's forward, which knows nothing of it: for balancing and for reports.

    with collecting() as notes:
        model(inputs)

A thread gathers its own notes only. A forward that is computed again in the backward pass adds nothing, since the
context is over by then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from padconvert.layers.padding import real_tokens

if TYPE_CHECKING:
    from padconvert.layers.routers import RouterModule


@dataclass(frozen=True, slots=True)
class Note:
    """One call of a router. T samples or tokens (padding left out), K experts; with the autograd graph."""

    router: RouterModule
    logits_TK: Tensor
    routing_TK: Tensor


class _Gathering(threading.local):
    notes: list[Note] | None = None


_gathering = _Gathering()


@contextmanager
def collecting() -> Iterator[list[Note]]:
    """The list that every router called within adds a note to. Contexts do not nest: the inner one gets the notes."""
    before, _gathering.notes = _gathering.notes, []
    try:
        yield _gathering.notes
    finally:
        _gathering.notes = before


def note(router: RouterModule, logits: Tensor, routing: Tensor) -> None:
    """Add a call's logits and routing weights, both [..., K], where somebody gathers them."""
    if _gathering.notes is not None:
        _gathering.notes.append(Note(router, real_tokens(logits), real_tokens(routing)))
