"""The data-only tree that stands between a pickle's opcodes (or a skeleton's JSON) and real objects.

A `Value` is a plain Python scalar or a node. Nodes are compared and shared by identity, as objects in a pickle are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Series(StrEnum):
    """The kinds of plain collections."""

    LIST = "list"
    TUPLE = "tuple"
    SET = "set"
    FROZENSET = "frozenset"
    DEQUE = "deque"


class Table(StrEnum):
    """The kinds of mappings."""

    DICT = "dict"
    ORDERED = "ordered"
    DEFAULT = "defaultdict"
    COUNTER = "counter"


class Plain(StrEnum):
    """Small immutable values that are made out of scalars."""

    SLICE = "slice"
    RANGE = "range"
    SIZE = "size"
    DEVICE = "device"
    COMPLEX = "complex"
    BYTEARRAY = "bytearray"


@dataclass(slots=True, eq=False)
class SeriesNode:
    kind: Series
    items: list[Value]
    maxlen: int | None = None  # a deque's


@dataclass(slots=True, eq=False)
class TableNode:
    kind: Table
    pairs: list[tuple[Value, Value]]
    factory: NameNode | None = None  # a defaultdict's
    state: TableNode | None = None  # attributes hung on an OrderedDict


@dataclass(slots=True, eq=False)
class PlainNode:
    kind: Plain
    args: tuple[Scalar, ...]


@dataclass(slots=True, eq=False)
class NameNode:
    """A class or a function, by its name."""

    module: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class MemberNode:
    """A member of an Enum, by its value or by its name."""

    cls: NameNode
    key: Scalar
    by_name: bool


@dataclass(slots=True, eq=False)
class ObjectNode:
    """An object that is made by `object.__new__` and then given its state."""

    cls: NameNode
    state: TableNode | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor's values lie in a file: counts are in entries of `dtype`, not bytes."""

    storage: str
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True, eq=False)
class TensorNode:
    """A tensor by its place in a file, or by its name or number in someone's collection."""

    source: View | str | int
    parameter: bool = False
    requires_grad: bool = False
    state: TableNode | None = None


@dataclass(slots=True, eq=False)
class StorageNode:
    """A storage as a pickle names it: `entries` of `dtype` under `key`; `offset` where it is a view of another."""

    key: str
    dtype: str | None  # None: untyped, and `entries` are bytes
    entries: int
    offset: int = 0


@dataclass(slots=True, eq=False)
class RefusedNode:
    """Something this reader never rebuilds. Harmless as long as nobody reads it."""

    name: NameNode
    why: str


Scalar = None | bool | int | float | str | bytes
Node = SeriesNode | TableNode | PlainNode | NameNode | MemberNode | ObjectNode | TensorNode | StorageNode | RefusedNode
Value = Scalar | Node


@dataclass(slots=True)
class Tree:
    """What one pickle says: its root, and every name it mentions, read or not."""

    root: Value
    names: list[NameNode] = field(default_factory=list)
    storages: dict[str, StorageNode] = field(default_factory=dict)


def children(node: Node) -> Iterator[Value]:
    """The values directly inside a node, in their order; not the names of its class or factory."""
    match node:
        case SeriesNode():
            yield from node.items
        case TableNode():
            for key, value in node.pairs:
                yield key
                yield value
            yield node.state
        case ObjectNode() | TensorNode():
            yield node.state


def walk(root: Value) -> list[Node]:
    """Every node under `root` once, each after its children (except where a cycle forbids it)."""
    done: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Value, Iterator[Value] | None]] = [(root, None)]
    while stack:
        value, rest = stack.pop()
        if rest is None:
            if not isinstance(value, Node) or id(value) in seen:
                continue
            seen.add(id(value))
            rest = children(value)
        assert isinstance(value, Node)
        for child in rest:
            if isinstance(child, Node) and id(child) not in seen:
                stack += [(value, rest), (child, None)]
                break
        else:
            done.append(value)
    return done
