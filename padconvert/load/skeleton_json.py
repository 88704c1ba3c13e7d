"""The tree of `nodes` ↔ JSON; see `skeleton` for the form. Decoding trusts nothing it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from padconvert.errors import FileError
from padconvert.load.nodes import (
    MemberNode,
    NameNode,
    Node,
    ObjectNode,
    Plain,
    PlainNode,
    RefusedNode,
    Scalar,
    Series,
    SeriesNode,
    StorageNode,
    Table,
    TableNode,
    TensorNode,
    Value,
)
from padconvert.load.reductions import DTYPE_BYTES

VERSION = 1
#: what nearly every module has empty; left out of the document as long as it is
_EMPTY: dict[str, Table | Series | None] = {
    "_parameters": Table.DICT,
    "_buffers": Table.DICT,
    "_non_persistent_buffers_set": Series.SET,
    "_backward_pre_hooks": Table.ORDERED,
    "_backward_hooks": Table.ORDERED,
    "_is_full_backward_hook": None,
    "_forward_hooks": Table.ORDERED,
    "_forward_hooks_with_kwargs": Table.ORDERED,
    "_forward_hooks_always_called": Table.ORDERED,
    "_forward_pre_hooks": Table.ORDERED,
    "_forward_pre_hooks_with_kwargs": Table.ORDERED,
    "_state_dict_hooks": Table.ORDERED,
    "_state_dict_pre_hooks": Table.ORDERED,
    "_load_state_dict_pre_hooks": Table.ORDERED,
    "_load_state_dict_post_hooks": Table.ORDERED,
    "_modules": Table.DICT,
}
_MAX_COUNT = 1 << 48
_GAPS = 4


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a skeleton says of one tensor. `stride` where it is not row-major; `base` is (name, offset in entries)
    where it is a view of another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    base: tuple[str, int] | None = None


def keeps_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor is laid out again as it was: no two entries in one place, and few gaps between them.

    The layout decides the order in which torch adds up, and so the last bits of a result.
    """
    extent = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step < extent:
            return False
        extent += (size - 1) * step
    return 0 < extent <= _GAPS * math.prod(shape)


# encoding


def encode(root: Value, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """The JSON document of a tree whose tensors are named."""
    encoder = _Encoder(specs)
    value = encoder.value(root)
    while len(encoder.objects) < len(encoder.waiting):
        encoder.objects.append(encoder.entry(encoder.waiting[len(encoder.objects)]))
    return {"version": VERSION, "root": value, "objects": encoder.objects}


class _Encoder:
    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.numbers: dict[object, int] = {}
        self.waiting: list[Node] = []
        self.objects: list[list[Any]] = []
        self.modules: set[int] = set()  # ids of the tables that are the state of a module

    def value(self, value: Value) -> Any:
        if isinstance(value, Node):
            # names are the same thing wherever they stand
            key: object = value.full if isinstance(value, NameNode) else id(value)
            if key not in self.numbers:
                self.numbers[key] = len(self.waiting)
                self.waiting.append(value)
            return [self.numbers[key]]
        return _scalar(value)

    def pairs(self, table: TableNode) -> list[list[Any]]:
        short = id(table) in self.modules
        return [
            [self.value(key), self.value(value)]
            for key, value in table.pairs
            if not (short and _is_left_out(key, value))
        ]

    def entry(self, node: Node) -> list[Any]:
        match node:
            case SeriesNode(kind=Series.SET | Series.FROZENSET):
                # a set has no order of its own, and its order in memory differs from process to process
                ordered = sorted(node.items, key=lambda item: (type(item).__name__, repr(_sortable(item))))
                return [node.kind.value, [self.value(item) for item in ordered]]
            case SeriesNode(kind=Series.DEQUE):
                return [node.kind.value, [self.value(item) for item in node.items], node.maxlen]
            case SeriesNode():
                return [node.kind.value, [self.value(item) for item in node.items]]
            case TableNode():
                return [node.kind.value, self.pairs(node), self.value(node.factory), self.value(node.state)]
            case PlainNode():
                return [node.kind.value, [_scalar(argument) for argument in node.args]]
            case NameNode():
                return ["name", node.module, node.name]
            case MemberNode():
                return ["member", self.value(node.cls), _scalar(node.key), node.by_name]
            case ObjectNode(state=TableNode() as state) if _is_module(state):
                self.modules.add(id(state))
                return ["module", self.value(node.cls), self.value(state)]
            case ObjectNode():
                return ["object", self.value(node.cls), self.value(node.state)]
            case TensorNode():
                return ["tensor", self.tensor(node)]
            case StorageNode() | RefusedNode():
                raise AssertionError(node)  # the build before this refused them

    def tensor(self, node: TensorNode) -> dict[str, Any]:
        spec = self.specs[str(node.source)]
        entry: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
        if spec.stride is not None:
            entry["stride"] = list(spec.stride)
        if spec.base is not None:
            entry["base"] = list(spec.base)
        if node.parameter:
            entry["parameter"] = True
        if node.requires_grad:
            entry["requires_grad"] = True
        if node.state is not None:
            entry["state"] = self.value(node.state)
        return entry


def _is_module(state: TableNode) -> bool:
    """Whether a state has all the tables that torch gives a module, so that the empty ones can be left out."""
    return _EMPTY.keys() <= {key for key, _ in state.pairs if isinstance(key, str)}


def _is_left_out(key: Value, value: Value) -> bool:
    if not isinstance(key, str) or key not in _EMPTY:
        return False
    match value:
        case TableNode(pairs=[], factory=None, state=None):
            return value.kind is _EMPTY[key]
        case SeriesNode(items=[]):
            return value.kind is _EMPTY[key]
        case _:
            return value is None and _EMPTY[key] is None


def _empty_node(kind: Table | Series | None) -> Value:
    match kind:
        case Table():
            return TableNode(kind, [])
        case Series():
            return SeriesNode(kind, [])
        case None:
            return None


def _scalar(value: Scalar) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    return value


def _sortable(value: Value) -> object:
    match value:
        case NameNode():
            return value.full
        case PlainNode():
            return value.args
        case SeriesNode():
            return [_sortable(item) for item in value.items]
        case _:
            return value


# decoding


class _Damaged(Exception):
    """Something in the document is not of the form above."""


def decode(document: object, where: str) -> tuple[Value, list[NameNode], dict[str, TensorSpec]]:
    """The tree, all names in it, and what it says of its tensors. Raises FileError where it is not of this form."""
    try:
        decoder = _Decoder(document)
        for number in range(len(decoder.entries)):
            decoder.fill(number)
        decoder.complete_modules()
        return decoder.value(_field(document, "root")), decoder.names, decoder.specs
    except _Damaged as error:
        raise FileError(f"{where} is damaged: {error}.") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileError(f"{where} is damaged ({type(error).__name__}: {error}).") from None


def _field(document: object, name: str) -> Any:
    if not isinstance(document, dict) or name not in document:
        raise _Damaged(f"it has no '{name}'")
    return document[name]


class _Decoder:
    """Two passes: an empty node for every entry first, so that any may refer to any; then what is in them."""

    def __init__(self, document: object) -> None:
        if _field(document, "version") != VERSION:
            raise _Damaged(f"version {_field(document, 'version')!r} is not known to this padconvert")
        self.entries = [_listed(entry) for entry in _listed(_field(document, "objects"))]
        self.names: list[NameNode] = []
        self.specs: dict[str, TensorSpec] = {}
        self.nodes = [self.empty(entry) for entry in self.entries]

    def empty(self, entry: list[Any]) -> Node:
        kind = _text(entry[0])
        if kind in _SERIES:
            return SeriesNode(Series(kind), [])
        if kind in _TABLES:
            return TableNode(Table(kind), [])
        if kind in _PLAINS:
            return PlainNode(Plain(kind), tuple(_unscalar(argument) for argument in _listed(entry[1])))
        match kind:
            case "name":
                return self.name(_text(entry[1]), _text(entry[2]))
            case "member":
                return MemberNode(NameNode("", ""), _unscalar(entry[2]), bool(entry[3]))
            case "object" | "module":
                return ObjectNode(NameNode("", ""))
            case "tensor":
                return self.tensor(entry[1])
            case _:
                raise _Damaged(f"an object of unknown kind {kind!r}")

    def name(self, module: str, name: str) -> NameNode:
        node = NameNode(module, name)
        self.names.append(node)
        return node

    def tensor(self, entry: Any) -> TensorNode:
        if not isinstance(entry, dict):
            raise _Damaged("a tensor that is not described")
        name, dtype = _text(entry.get("name")), _text(entry.get("dtype"))
        if dtype not in DTYPE_BYTES or name in self.specs:
            raise _Damaged(f"tensor {name!r} stands there twice or has the unknown dtype {dtype!r}")
        stride, base = entry.get("stride"), entry.get("base")
        spec = TensorSpec(
            name,
            dtype,
            _counts(entry.get("shape")),
            None if stride is None else _counts(stride),
            None if base is None else (_text(base[0]), _counts([base[1]])[0]),
        )
        if spec.stride is not None and len(spec.stride) != len(spec.shape):
            raise _Damaged(f"tensor {name!r} has a stride of another rank")
        self.specs[name] = spec
        return TensorNode(name, entry.get("parameter") is True, entry.get("requires_grad") is True)

    def fill(self, number: int) -> None:
        entry, node = self.entries[number], self.nodes[number]
        match node:
            case SeriesNode():
                node.items = [self.value(item) for item in _listed(entry[1])]
                node.maxlen = _counts([entry[2]])[0] if len(entry) > 2 and entry[2] is not None else None
            case TableNode():
                node.pairs = [self.pair(pair) for pair in _listed(entry[1])]
                node.factory = None if entry[2] is None else self.name_at(entry[2])
                node.state = self.table_at(entry[3])
            case MemberNode():
                node.cls = self.name_at(entry[1])
            case ObjectNode():
                node.cls = self.name_at(entry[1])
                node.state = self.table_at(entry[2])
            case TensorNode():
                node.state = self.table_at(entry[1].get("state"))

    def complete_modules(self) -> None:
        """Give every module the empty tables that the document leaves out."""
        for entry, node in zip(self.entries, self.nodes, strict=True):
            if entry[0] != "module":
                continue
            if not isinstance(node, ObjectNode) or not isinstance(node.state, TableNode):
                raise _Damaged("a module without a state")
            there = {key for key, _ in node.state.pairs if isinstance(key, str)}
            missing = [(name, _empty_node(kind)) for name, kind in _EMPTY.items() if name not in there]
            node.state.pairs = [*missing, *node.state.pairs]

    def pair(self, pair: Any) -> tuple[Value, Value]:
        key, value = _listed(pair)
        return self.value(key), self.value(value)

    def value(self, value: Any) -> Value:
        if isinstance(value, list) and len(value) == 1 and type(value[0]) is int:
            return self.nodes[_counts(value)[0]]
        return _unscalar(value)

    def name_at(self, value: Any) -> NameNode:
        node = self.value(value)
        if not isinstance(node, NameNode):
            raise _Damaged("something stands where a class belongs")
        return node

    def table_at(self, value: Any) -> TableNode | None:
        node = self.value(value)
        if node is not None and not isinstance(node, TableNode):
            raise _Damaged("a state that is not a dict")
        return node


_SERIES = frozenset(kind.value for kind in Series)
_TABLES = frozenset(kind.value for kind in Table)
_PLAINS = frozenset(kind.value for kind in Plain)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Damaged(f"a {type(value).__name__} stands where a list belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Damaged(f"a {type(value).__name__} stands where text belongs")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    values = _listed(value)
    if not all(type(count) is int and 0 <= count <= _MAX_COUNT for count in values):
        raise _Damaged("a size that is not a whole number")
    return tuple(values)


def _unscalar(value: Any) -> Scalar:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case ["float", "nan" | "inf" | "-inf" as text]:
            return float(text)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case _:
            raise _Damaged(f"a {type(value).__name__} stands where a plain value belongs")
