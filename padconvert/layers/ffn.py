"""Members of a feed-forward block (FFN) that is converted as a whole: one routing for down(act(up(x))).

The first member routes and computes its output for the chosen experts; its peer (of a gated block) does the same for
them; the last one takes what came out and weighs it. In between the hidden state is widened, [..., top_k · h], or
[..., static + top_k · dynamic] with `neuron`; the pointwise operations that stand there cannot tell. So the members
may live in different modules, as in BERT, and the model's forward is not touched.

A call's routing passes through a slot that the members share. It is a `threading.local`: a plain attribute mixes up
concurrent calls, and a dictionary by thread breaks torch.export.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from padconvert.layers.facts import LayerFacts
from padconvert.layers.linear import PadLinear
from padconvert.layers.packed import Units
from padconvert.layers.padding import watch_padding_
from padconvert.layers.paths import experts
from padconvert.layers.paths.experts import Routed
from padconvert.words import Granularity, Place, Routing


class Slot:
    """The routing of the call that is under way in this thread. A copy or an unpickled one is empty."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def put(self, routed: Routed) -> None:
        self._of_thread.routed = routed

    def look(self, lead: tuple[int, ...]) -> Routed:
        """The routing of this call. Raises RuntimeError where no member routed before, or one did for another input."""
        routed: Routed | None = getattr(self._of_thread, "routed", None)
        if routed is None:
            raise RuntimeError("a member of a feed-forward block was called before the block's first member")
        if routed.lead != lead:
            raise RuntimeError(
                f"a member of a feed-forward block got an input of shape [{', '.join(map(str, lead))}, ...], "
                f"its first member one of [{', '.join(map(str, routed.lead))}, ...]"
            )
        return routed

    def take(self, lead: tuple[int, ...]) -> Routed:
        """As `look`; the slot is empty afterwards."""
        routed = self.look(lead)
        self._of_thread.routed = None
        return routed

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


class Block:
    """What the members of one block share: each other, and the slot. A plain object, so that no module owns another."""

    def __init__(self) -> None:
        self.members: list[PadLinearMember] = []
        self.slot = Slot()


class PadLinearMember(PadLinear):
    """A linear layer of a feed-forward block; see this file's first lines. Alone it raises RuntimeError when called."""

    def __init__(self, facts: LayerFacts, device: Any = None) -> None:
        super().__init__(facts, device)
        self.block = Block()
        self.block.members.append(self)

    @property
    def merges(self) -> bool:
        """Whether one weight is mixed for each sequence out of all experts (soft), so that nothing is widened."""
        return self.top_k == 0

    def place_units_(self, units: Units) -> None:
        """A hidden unit is dynamic in the whole block, and its first member stores which are."""
        for member in self.block.members if self.granularity is Granularity.NEURON else [self]:
            super(PadLinearMember, member).place_units_(units)

    def forward(self, x: Tensor) -> Tensor:
        """First and peer: [..., C] → the widened hidden state. Last: the widened hidden state → [..., O]."""
        lead = tuple(x.shape[:-1])
        match self.place:
            case Place.FIRST:
                routed = experts.routed(self, x)
                self.block.slot.put(routed)
            case Place.PEER:
                routed = self.block.slot.look(lead)
            case _:
                routed = self.block.slot.take(lead)
                return experts.narrow(self, x, routed)
        return experts.widen(self, x, routed)


def join_groups_(model: nn.Module) -> None:
    """Connect the members of every feed-forward block of `model`, and let its calls say what is padding where a layer
    is routed by its sequence. Doing it twice changes nothing."""
    members = [module for module in model.modules() if isinstance(module, PadLinearMember)]
    for group in dict.fromkeys(member.group for member in members):
        _join_([member for member in members if member.group == group])
    if any(isinstance(m, PadLinear) and m.routing is Routing.SEQUENCE for m in model.modules()):
        watch_padding_(model)


def _join_(members: list[PadLinearMember]) -> None:
    block = Block()
    block.members = members
    for member in members:
        member.block = block
    for member in members:
        if member.place is Place.FIRST:
            member.reindex_()
