"""Which rows a table of layers has: a feed-forward block's layers together, and equal rows of a large network once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from padconvert.results import LayerResult
from padconvert.words import Place

#: a network with fewer layers is shown layer by layer
FOLD_FROM = 24
PLACES = (Place.FIRST.value, Place.PEER.value, Place.LAST.value)
#: before the names of a block's layers
BRANCHES = {Place.PEER.value: "├ ", Place.LAST.value: "└ "}


@dataclass(frozen=True, slots=True)
class Row:
    """One layer, or `count` layers that differ in a number of their names only.

    `layer` is the first of them, its `separation` their mean; `name` says all of them, as
    `encoder.layer.{0…5}.attention.self.query`. `branch` joins it to its block's first layer; then `name` is without
    what both names begin with.
    """

    layer: LayerResult
    name: str
    count: int = 1
    branch: str = ""


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is folded as a whole: a layer by itself, or the layers of a block in their places."""

    layers: tuple[LayerResult, ...]
    at: int  # the part of the names that differs
    numbers: tuple[str, ...]  # what stands there, of all that are folded into this one

    def rows(self) -> list[Row]:
        first, *others = (_spread(layer.name, self.at, self.numbers) for layer in self.layers)
        names = [first, *(_without_shared(name, first) for name in others)]
        branches = ["", *(BRANCHES.get(layer.place, "") for layer in self.layers[1:])]
        count = max(len(self.numbers), 1)
        return [
            Row(layer, name, count, branch) for layer, name, branch in zip(self.layers, names, branches, strict=True)
        ]


def layer_rows(layers: Sequence[LayerResult]) -> list[Row]:
    """In the order of the layers, a block at the place of its first-named layer."""
    units = _units(layers)
    if len(layers) >= FOLD_FROM:
        units = _folded(units)
    return [row for unit in units for row in unit.rows()]


def _units(layers: Sequence[LayerResult]) -> list[_Unit]:
    blocks: dict[str, list[LayerResult]] = defaultdict(list)
    for layer in layers:
        blocks[layer.group or f"alone {layer.name}"].append(layer)
    inside = [sorted(block, key=lambda layer: _place(layer)) for block in blocks.values()]
    return [_Unit(tuple(block), -1, ()) for block in inside]


def _place(layer: LayerResult) -> int:
    return PLACES.index(layer.place) if layer.place in PLACES else 0


def _folded(units: Sequence[_Unit]) -> list[_Unit]:
    """Units that differ in one number of their names become one: in the first number first, where that finds any."""
    left = list(units)
    for at in range(max(unit.layers[0].name.count(".") + 1 for unit in units)):
        classes: dict[Hashable, list[int]] = defaultdict(list)
        for i, unit in enumerate(left):
            if not unit.numbers and (key := _key(unit, at)) is not None:
                classes[key].append(i)
        for members in classes.values():
            if len(members) > 1:
                numbers = tuple(left[i].layers[0].name.split(".")[at] for i in members)
                together = tuple(map(_mean, zip(*(left[i].layers for i in members), strict=True)))
                left[members[0]] = _Unit(together, at, numbers)
                for i in members[1:]:
                    left[i] = replace(left[i], layers=())
        left = [unit for unit in left if unit.layers]
    return left


def _key(unit: _Unit, at: int) -> Hashable | None:
    """What units have in common that are told apart by part `at` of their names; None where that is no number."""
    kept = []
    number = None
    for layer in unit.layers:
        parts = layer.name.split(".")
        if layer.aliases or len(parts) <= at or not parts[at].isdecimal() or number not in (None, parts[at]):
            return None
        number = parts[at]
        kept.append(replace(layer, name=".".join((*parts[:at], "", *parts[at + 1 :])), group="", separation=None))
    return tuple(kept)


def _mean(layers: Sequence[LayerResult]) -> LayerResult:
    """Equal layers as one: what was measured of each becomes its mean."""
    known = [layer.separation for layer in layers if layer.separation is not None]
    return replace(layers[0], separation=fmean(known) if known else None)


def _spread(name: str, at: int, numbers: Sequence[str]) -> str:
    if not numbers:
        return name
    parts = name.split(".")
    return ".".join((*parts[:at], f"{{{_runs([int(number) for number in numbers])}}}", *parts[at + 1 :]))


def _without_shared(name: str, other: str) -> str:
    """`name` without the parts that both names begin with."""
    parts, others = name.split("."), other.split(".")
    while len(parts) > 1 and len(others) > 1 and parts[0] == others[0]:
        del parts[0], others[0]
    return ".".join(parts)


def _runs(numbers: Sequence[int]) -> str:
    """`0…5`, or `0,2…4` where some are missing."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}…{high}" for low, high in runs)
