"""Feed-forward blocks (FFN): which layers form one, proven by the chains of a watched forward, and why others do not.

A group is up (d → h), or gate and up on one input, and down (h → d), h > d, in every call alike. Its layers can all
be converted, and none of them makes the output or belongs to an attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from padconvert.walk.forward import Watched
from padconvert.walk.found import Found
from padconvert.walk.trace import Chain
from padconvert.words import Place, Reason, Role

PLACES = {2: (Place.FIRST, Place.LAST), 3: (Place.FIRST, Place.PEER, Place.LAST)}
OTHERWISE = frozenset({Role.HEAD, Role.ATTENTION})  # what these are comes first

UNWATCHED = "no forward was watched, so nothing shows what stands within its feed-forward block"
ALONE = "the layer right before it is none that widens to its input"
UNLIKE = "{up} and {down} do not belong together in every call"


@dataclass(frozen=True, slots=True)
class Groups:
    """By layer number: (name of the group, place in it), and for the layers that are in none why."""

    members: Mapping[int, tuple[str, Place]]
    words: Mapping[int, str]


def find_groups(
    layers: Sequence[Found], watched: Watched | None, roles: Sequence[Role], reasons: Sequence[Reason]
) -> Groups:
    """All proven groups. `words` has every layer of role FFN that is in none of them."""
    ffn = [index for index, role in enumerate(roles) if role is Role.FFN]
    if watched is None:
        return Groups({}, dict.fromkeys(ffn, UNWATCHED))
    proof = _Proof(layers, watched, roles, reasons)
    members: dict[int, tuple[str, Place]] = {}
    for chain in dict.fromkeys(watched.chains):
        if proof.fault(chain) is None:
            whole = _whole(chain)
            name = layers[whole[0]].name
            members.update((index, (name, place)) for index, place in zip(whole, PLACES[len(whole)], strict=True))
    return Groups(members, {index: proof.words(index) for index in ffn if index not in members})


def _whole(chain: Chain) -> tuple[int, ...]:
    return chain.ups if chain.down is None else (*chain.ups, chain.down)


class _Proof:
    """What speaks against a chain's layers as a group."""

    def __init__(
        self, layers: Sequence[Found], watched: Watched, roles: Sequence[Role], reasons: Sequence[Reason]
    ) -> None:
        self.layers, self.watched, self.roles, self.reasons = layers, watched, roles, reasons
        self.chains: dict[int, Counter[Chain]] = {}  # of each layer, as up or as down
        for chain in watched.chains:
            for index in _whole(chain):
                self.chains.setdefault(index, Counter())[chain] += 1

    def fault(self, chain: Chain) -> tuple[str, Chain] | None:
        """Words with places for {up} and {down}, and the chain whose up and down they speak of; None for a group."""
        calls = [other for index in _whole(chain) for other in self.chains[index]]
        if broken := next((each for each in (chain, *calls) if each.blame), None):
            return broken.blame, broken
        if any(other != chain for other in calls) or any(
            self.chains[index][chain] != self.watched.seen[index].calls for index in _whole(chain)
        ):
            return UNLIKE, chain
        outside = (words for index in _whole(chain) if (words := self._outside(index)))
        return next(((words, chain) for words in outside), None)

    def _outside(self, index: int) -> str:
        """Why this layer can be in no group at all."""
        name = self.layers[index].name
        if self.reasons[index] is not Reason.ELIGIBLE:
            return f"{name} of the same feed-forward block cannot be converted: {self.reasons[index].explanation}"
        if self.roles[index] in OTHERWISE:
            return f"{name} of the same feed-forward block counts as {self.roles[index]}"
        return ""

    def words(self, index: int) -> str:
        """Why a layer is in no group, as said of `it`."""
        faults = (self.fault(chain) for chain in self.chains.get(index, ()))
        fault = next((each for each in faults if each is not None), None)
        if fault is None:
            return ALONE
        words, chain = fault
        up = index if index in chain.ups else chain.ups[0]
        for place, other in (("{up}", up), ("{down}", chain.down)):
            if other is not None:
                words = words.replace(place, self._called(other, index))
        return words

    def _called(self, index: int, by: int) -> str:
        """A layer's name for another layer: without the parts that both names begin with."""
        if index == by:
            return "it"
        parts, others = self.layers[index].name.split("."), self.layers[by].name.split(".")
        while len(parts) > 1 and len(others) > 1 and parts[0] == others[0]:
            del parts[0], others[0]
        return ".".join(parts)
