"""The dataflow behind layers that widen: does nothing but pointwise work stand between them and the next layer?

The values between such a layer `up` (d → h) and the layer that takes them are *hidden values*; they form a strand.
A strand is followed from call to call while the forward runs. What may happen to a hidden value: operations that
compute each entry from the entries at the same place, with scalars and with operands that are 1 wide (a factor per
token). Everything else breaks the strand, and the first such thing is its blame. No tensor is kept: a hidden value
is known by its memory, and a weak reference keeps the number of that memory from being given out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from padconvert.walk.found import Found
from padconvert.words import Kind

CHECKS = frozenset({"_assert_tensor_metadata"})  # of an exported program: they compute nothing
# Pointwise without torch's tag; the dispatcher's names, without the underscore of those in place.
UNTAGGED = frozenset(
    {
        *("native_dropout", "hardswish", "threshold", "masked_fill", "rsub", "_prelu_kernel"),
        *("_to_copy", "clone", "contiguous", "alias", "detach"),
        *("view", "_unsafe_view", "_reshape_alias"),  # to the same shape, or the shape breaks the strand
    }
)
DIVISIONS = frozenset({"split", "split_with_sizes", "slice", "unbind", "glu"})

# What broke a strand. {up} and {down} are filled in with names.
BETWEEN = "{op} stands between {up} and {down}"
BESIDE = "{op} reads the values between {up} and {down} too"
OPERAND = "{op} brings in another tensor between {up} and {down}"
SHAPE = "{op} changes the shape between {up} and {down}"
DIVIDED = "{up} holds a gate and an up layer in one weight: {op} divides its output"
JOINED = "{op} joins {up} with another layer that is no gate on the same input"
RETURNED = "the model returns values from between {up} and {down}"
KEPT = "the model keeps values from between {up} and {down}"
AGAIN = "{up} is called again before {down}"
WIDTH = "{down} does not lead from {up} back to the width of its input"
SECOND = "more than one layer reads the output of {up}"
NOWHERE = "no layer takes the output of {up}"

Memory = tuple[Tensor, int]  # a tensor and the number of its storage


@dataclass(frozen=True, slots=True)
class Chain:
    """One call each of one or two layers and what took their output. Layers are numbers; `blame` is "" if proven."""

    ups: tuple[int, ...]  # in the order of their calls
    down: int | None
    blame: str


@dataclass(slots=True, eq=False)
class Strand:
    """A chain while it is followed."""

    ups: list[int]
    given: tuple[Any, ...]  # which tensor went into the ups, in which version
    shape: torch.Size
    held: StorageWeakRef  # of the input: its memory's number means this tensor as long as the strand is followed
    hidden: list[int] = field(default_factory=list)  # storages
    down: int | None = None
    reached: bool = False  # `down` took a hidden value itself, not something made of one
    op: str = ""
    blame: str = ""

    def break_(self, blame: str, op: str = "") -> None:
        """The first thing that breaks a strand is what a person is told."""
        if not self.blame:
            self.blame, self.op = blame, op

    def chain(self) -> Chain:
        blame = BESIDE if self.blame == BETWEEN and self.reached else self.blame
        if self.down is None:
            blame = blame.replace("between {up} and {down}", "after {up}").replace("before {down}", "before that")
        return Chain(tuple(self.ups), self.down, blame.replace("{op}", self.op))


class Trace:
    """All strands of one forward. The caller tells it of operations and of layers' calls, in their order."""

    def __init__(self, layers: Sequence[Found]) -> None:
        self.layers = layers
        self.strands: list[Strand] = []
        self.hidden: dict[int, Strand] = {}
        self.alive: dict[int, StorageWeakRef] = {}

    def operation(self, func: Any, read: Sequence[Memory], made: Sequence[Memory]) -> None:
        """An operation outside the layers."""
        touched = list(dict.fromkeys(self.hidden[memory] for _, memory in read if memory in self.hidden))
        if not touched:
            return
        op = _name(func)
        strand = None if op in CHECKS else self._join(touched, op)
        if strand is None:
            return
        if strand.down is not None:
            strand.break_(BESIDE, op)
        elif blame := self._blame(func, strand, read, made):
            strand.break_(blame, op)
        else:
            for tensor, memory in made:
                self._hide(strand, tensor, memory)

    def _blame(self, func: Any, strand: Strand, read: Sequence[Memory], made: Sequence[Memory]) -> str:
        """What is wrong with an operation on hidden values of this one strand; "" for a pointwise one."""
        name = _name(func)
        if name in DIVISIONS:
            return DIVIDED
        if not _is_pointwise(func):
            return SHAPE if getattr(func, "is_view", False) else BETWEEN
        if any(memory not in self.hidden and tensor.shape[-1:] not in ((), (1,)) for tensor, memory in read):
            return OPERAND
        shapes = [tensor.shape for tensor, memory in read if memory in self.hidden] + [
            tensor.shape for tensor, _ in made
        ]
        return "" if made and all(shape == strand.shape for shape in shapes) else SHAPE

    def _join(self, touched: Sequence[Strand], op: str) -> Strand | None:
        """The one strand that all of these are, or become here: a gate and an up on one input."""
        first, *others = sorted(touched, key=self.strands.index)
        if not others:
            return first
        ups = [up for strand in (first, *others) for up in strand.ups]
        alike = all((other.given, other.shape) == (first.given, first.shape) for other in others)
        if len(set(ups)) != len(ups) or len(ups) > 2 or not alike or any(each.down is not None for each in touched):
            for strand in touched:
                strand.break_(JOINED, op)
            return None
        for other in others:
            first.break_(other.blame, other.op)
            first.ups += other.ups
            first.hidden += other.hidden
            self.hidden.update(dict.fromkeys(other.hidden, first))
            self.strands.remove(other)
        return first

    def _hide(self, strand: Strand, tensor: Tensor, memory: int) -> None:
        if memory not in self.hidden:
            self.alive[memory] = StorageWeakRef(tensor.untyped_storage())
            self.hidden[memory] = strand
            strand.hidden.append(memory)

    def layer(self, index: int, read: Sequence[Memory], output: Memory, origins: frozenset[int]) -> None:
        """A layer's call. `origins`: the layers that its input was made by, without another layer in between."""
        for strand in dict.fromkeys(self.hidden[memory] for _, memory in read if memory in self.hidden):
            self._take(strand, index, read)
        for strand in self.strands:
            if strand.down is None and strand.blame and not origins.isdisjoint(strand.ups):
                strand.down = index
        if self._widens(index) and len(read) == 1:
            self._open(index, *read[0], output)

    def _take(self, strand: Strand, index: int, read: Sequence[Memory]) -> None:
        if strand.reached:
            strand.break_(SECOND)
            return
        strand.down, strand.reached = index, True
        up, down = self.layers[strand.ups[0]], self.layers[index]
        if down.kind is not Kind.LINEAR or down.weight_shape != up.weight_shape[::-1]:
            strand.break_(WIDTH)
        elif len(read) != 1 or read[0][0].shape != strand.shape:
            strand.break_(SHAPE, "a view")

    def _widens(self, index: int) -> bool:
        layer = self.layers[index]
        return layer.kind is Kind.LINEAR and layer.weight_shape[:1] > layer.weight_shape[1:]

    def _open(self, index: int, given: Tensor, memory: int, output: Memory) -> None:
        for strand in self.strands:
            if index in strand.ups and strand.down is None:
                strand.break_(AGAIN)
        try:
            held = StorageWeakRef(given.untyped_storage())
            version = 0 if given.is_inference() else given._version
        except (NotImplementedError, RuntimeError):  # a wrapper tensor: nothing can be said of its memory
            return
        key = (memory, given.storage_offset(), given.shape, given.stride(), version)
        strand = Strand([index], key, output[0].shape, held)
        self.strands.append(strand)
        self._hide(strand, *output)

    def finish(self, returned: Iterable[int]) -> tuple[Chain, ...]:
        """All chains, in the order of their first call; call it after the forward, while its output lives."""
        for memory in returned:
            if memory in self.hidden:
                self.hidden[memory].break_(RETURNED)
        for memory, reference in self.alive.items():
            if not reference.expired():
                self.hidden[memory].break_(KEPT)
        for strand in self.strands:
            if strand.down is None:
                strand.break_(NOWHERE)
        return tuple(strand.chain() for strand in self.strands)


def _name(func: Any) -> str:
    """`layer_norm` for `aten::native_layer_norm`; an operation in place has the name of the other."""
    schema = getattr(func, "_schema", None)
    name = str(func if schema is None else schema.name).rpartition("::")[2]
    name = name.removeprefix("native_") if name.endswith("_norm") else name
    return name.rstrip("_")


@cache
def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in getattr(func, "tags", ()) or _name(func) in UNTAGGED
