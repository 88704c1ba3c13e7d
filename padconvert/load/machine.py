"""Pickle opcodes → the data-only tree of `nodes`. Nothing is imported, called or built here."""

from __future__ import annotations

import contextlib
import gc
import pickletools
from collections.abc import Callable, Iterator
from typing import Protocol

from padconvert.allow import hint
from padconvert.errors import FileError, UnsafeError
from padconvert.load.budget import Budget
from padconvert.load.nodes import (
    NameNode,
    Node,
    ObjectNode,
    RefusedNode,
    Series,
    SeriesNode,
    StorageNode,
    Table,
    TableNode,
    TensorNode,
    Tree,
    Value,
)
from padconvert.load.reductions import Refusal, persistent, rebuilt, spelled

_SCALARS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": Series.LIST, "EMPTY_TUPLE": Series.TUPLE, "EMPTY_SET": Series.SET}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}


class Readable(Protocol):
    """What `pickletools` needs of a file."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class _Mark:
    """Where a MARK opcode stands on the stack."""


_MARK = _Mark()
_Slot = Value | _Mark


def parse(source: Readable | bytes, where: str, names: list[NameNode] | None = None, *, numbered: bool = False) -> Tree:
    """The tree of the one pickle that starts at `source`; a file is left right behind it. `names` gets every name in
    it, also of a pickle that is damaged further on. `numbered`: its tensors are numbers of a caller's own list, which
    no file may ask for.

    Raises FileError for a damaged pickle, UnsafeError for opcodes that no saved model needs.
    """
    machine = _Machine(where, names, numbered)
    position: int | None = None
    try:
        with _without_collector():
            for opcode, argument, at in pickletools.genops(source):  # type: ignore[arg-type]
                position = at
                machine.run(opcode.name, argument)
    except (ValueError, IndexError, KeyError, EOFError, TypeError, OverflowError) as error:
        place = "" if position is None else f" at byte {position}"
        raise FileError(
            f"{where}: the pickle inside is damaged or cut off{place} ({_short(error)}). Save or download it again."
        ) from error
    return machine.tree()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Nodes are made by the million and none is garbage: to look through them for it takes longer than to make them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class _Machine:
    """A pickle machine whose only results are nodes."""

    def __init__(self, where: str, met: list[NameNode] | None = None, numbered: bool = False) -> None:
        self.where = where
        self.met = met
        self.by_number = numbered
        self.budget = Budget(where)
        self.stack: list[_Slot] = []
        self.memo: dict[int, Value] = {}
        self.names: list[NameNode] = []
        self.storages: dict[str, StorageNode] = {}
        self.numbered: dict[int, TensorNode] = {}
        self.finished = False

    def tree(self) -> Tree:
        if not self.finished or len(self.stack) != 1:
            raise FileError(f"{self.where}: the pickle inside is damaged (its stack does not come out even).")
        return Tree(self.pop(), self.names, self.storages)

    def run(self, name: str, argument: object) -> None:
        self.budget.opcode(argument)
        if name in _SCALARS:
            self.stack.append(argument)  # type: ignore[arg-type]
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(SeriesNode(_EMPTY[name], []))
        elif name in _SHORT_TUPLES:
            self.tuple_of(self.take(_SHORT_TUPLES[name]))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        else:
            if name == "INST":
                self.take_marked()
                self.global_(argument)
            raise UnsafeError(f"{self.where}: pickle opcode {name} is never needed by a saved model. Save it again.")

    # the stack

    def pop(self) -> Value:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise ValueError("a mark where a value belongs")
        return value

    def take(self, count: int) -> list[Value]:
        values = [self.pop() for _ in range(count)]
        return values[::-1]

    def take_marked(self) -> list[Value]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values  # type: ignore[return-value]
        raise ValueError("no mark on the stack")

    def top(self) -> Value:
        value = self.stack[-1]
        if isinstance(value, _Mark):
            raise ValueError("a mark where a value belongs")
        return value

    # what the opcodes do

    def nothing(self, _: object) -> None:
        pass

    def stop(self, _: object) -> None:
        self.finished = True

    def mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def drop(self, _: object) -> None:
        self.stack.pop()

    def drop_marked(self, _: object) -> None:
        self.take_marked()

    def duplicate(self, _: object) -> None:
        self.stack.append(self.top())

    def put(self, argument: object) -> None:
        self.memo[int(argument)] = self.top()  # type: ignore[call-overload]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, argument: object) -> None:
        self.stack.append(self.memo[int(argument)])  # type: ignore[call-overload]

    def list_of(self, _: object) -> None:
        self.stack.append(SeriesNode(Series.LIST, self.take_marked()))

    def tuple_of(self, items: list[Value]) -> None:
        self.stack.append(SeriesNode(Series.TUPLE, items))

    def tuple_marked(self, _: object) -> None:
        self.tuple_of(self.take_marked())

    def frozenset_of(self, _: object) -> None:
        self.stack.append(SeriesNode(Series.FROZENSET, self.take_marked()))

    def dict_of(self, _: object) -> None:
        self.stack.append(TableNode(Table.DICT, _pairs(self.take_marked())))

    def empty_dict(self, _: object) -> None:
        self.stack.append(TableNode(Table.DICT, []))

    def bytearray_of(self, argument: object) -> None:
        assert isinstance(argument, bytearray | bytes)
        self.stack.append(self.reduced(NameNode("builtins", "bytearray"), [bytes(argument)]))

    def append(self, _: object) -> None:
        self.extend([self.pop()])

    def appends(self, _: object) -> None:
        self.extend(self.take_marked())

    def extend(self, values: list[Value]) -> None:
        target = self.top()
        if isinstance(target, SeriesNode) and target.kind in (Series.LIST, Series.DEQUE):
            target.items += values
        elif not isinstance(target, RefusedNode):
            raise UnsafeError(f"{self.where}: its pickle appends to something that is not a list. Save it again.")

    def add_items(self, _: object) -> None:
        values = self.take_marked()
        target = self.top()
        if not isinstance(target, SeriesNode) or target.kind is not Series.SET:
            raise UnsafeError(f"{self.where}: its pickle adds to something that is not a set. Save it again.")
        target.items += values

    def set_item(self, _: object) -> None:
        self.set_pairs(self.take(2))

    def set_items(self, _: object) -> None:
        self.set_pairs(self.take_marked())

    def set_pairs(self, flat: list[Value]) -> None:
        target = self.top()
        if isinstance(target, TableNode):
            target.pairs += _pairs(flat)
        elif not isinstance(target, RefusedNode):
            raise UnsafeError(f"{self.where}: its pickle sets items of something that is not a dict. Save it again.")

    def global_(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self.stack.append(self.named(module, name))

    def stack_global(self, _: object) -> None:
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global's name is not text")
        self.stack.append(self.named(module, name))

    def named(self, module: str, name: str) -> NameNode:
        if module == "__builtin__" and name == "xrange":
            name = "range"
        # protocol 4 writes torch.tanh as a member of an inner class
        if module == "torch._C" and name.startswith("_VariableFunctionsClass."):
            module, name = "torch", name.removeprefix("_VariableFunctionsClass.")
        node = NameNode(_RENAMED.get(module, module), name)
        self.names.append(node)
        if self.met is not None:
            self.met.append(node)
        return node

    def reduce(self, _: object) -> None:
        function, args = self.take(2)
        if not isinstance(function, NameNode | RefusedNode) or not isinstance(args, SeriesNode):
            raise UnsafeError(f"{self.where}: its pickle calls something that is not a name. Save it again.")
        if isinstance(function, RefusedNode):
            self.stack.append(function)
        else:
            self.stack.append(self.reduced(function, args.items))

    def reduced(self, function: NameNode, args: list[Value]) -> Value:
        try:
            made = rebuilt(function, args)
        except Refusal as refusal:
            return RefusedNode(function, str(refusal))
        self.budget.call(made)
        return made

    def new_object(self, _: object) -> None:
        cls, args = self.take(2)
        self.stack.append(self.object_of(cls, args))

    def new_object_ex(self, _: object) -> None:
        cls, args, keywords = self.take(3)
        made = self.object_of(cls, args)
        if not isinstance(keywords, TableNode) or keywords.pairs:
            made = RefusedNode(_name_of(cls), "it is constructed with arguments")
        self.stack.append(made)

    def object_of(self, cls: Value, args: Value) -> Node:
        name = _name_of(cls)
        if not isinstance(args, SeriesNode) or args.items:
            return RefusedNode(name, "it is constructed with arguments")
        return ObjectNode(name)

    def build(self, _: object) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, RefusedNode):
            return
        if not isinstance(target, ObjectNode | TableNode) or not isinstance(state, TableNode):
            raise UnsafeError(f"{self.where}: its pickle sets a state that is not a plain dict{self.why(target)}.")
        if target.state is not None:
            raise UnsafeError(f"{self.where}: its pickle sets the state of one object twice. Save it again.")
        target.state = state

    def why(self, target: Value) -> str:
        """The next step for an object with a state of its own. A lazy layer's handle on its own hook is one: then the
        layer is what counts."""
        lazy = (name for name in self.names if name.full.startswith("torch.nn.parameter.Uninitialized"))
        name = next(lazy, target.cls if isinstance(target, ObjectNode) else None)
        return f": {name.full}; {hint(name.module, name.name)}" if name is not None else ". Save it again"

    def persistent_text(self, argument: object) -> None:
        try:
            self.stack.append(spelled(str(argument), self.named))
        except Refusal as refusal:
            raise FileError(f"{self.where}: {refusal}.") from None
        self.persistent_id(None)

    def persistent_id(self, _: object) -> None:
        try:
            node = persistent(self.pop())
        except Refusal as refusal:
            raise FileError(f"{self.where}: {refusal}.") from None
        if isinstance(node, StorageNode):
            known = self.storages.setdefault(node.key, node)
            if (known.dtype, known.entries) != (node.dtype, node.entries):
                raise FileError(f"{self.where}: storage {node.key!r} is described in two ways. Save it again.")
        if isinstance(node, TensorNode) and isinstance(node.source, int):
            if not self.by_number:
                raise ValueError("a persistent id that torch does not write")
            # pickle does not remember what it wrote as a persistent id, but one tensor is one node
            node = self.numbered.setdefault(node.source, node)
        self.stack.append(node)


def _name_of(cls: Value) -> NameNode:
    if not isinstance(cls, NameNode):
        raise ValueError("a class that is not a name")
    return cls


def _pairs(flat: list[Value]) -> list[tuple[Value, Value]]:
    if len(flat) % 2:
        raise ValueError("a dict with a key and no value")
    return list(zip(flat[::2], flat[1::2], strict=True))


_HANDLERS: dict[str, Callable[[_Machine, object], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_marked,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "LIST": _Machine.list_of,
    "TUPLE": _Machine.tuple_marked,
    "FROZENSET": _Machine.frozenset_of,
    "DICT": _Machine.dict_of,
    "EMPTY_DICT": _Machine.empty_dict,
    "BYTEARRAY8": _Machine.bytearray_of,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "NEWOBJ_EX": _Machine.new_object_ex,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
    "PERSID": _Machine.persistent_text,
}
