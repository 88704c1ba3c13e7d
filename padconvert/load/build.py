"""The data-only tree → objects, by `object.__new__` and state. Nothing out of the file is called.

The rules, checked before the first object is made:

* a class must be allowed by name, and must be what it is named; its instances take a plain dict as state, once;
* a state's keys are text, never `__dunder__`, and never hide a method or property of the class;
* modules carry no hooks, and their members are modules, parameters and tensors as they should be;
* a class's own `__setstate__` runs only if torch.nn.modules wrote it; classes with `__new__` or `__del__` are refused.
"""

from __future__ import annotations

import enum
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from padconvert.allow import FUNCTIONS, TYPES, hint, inside
from padconvert.errors import FileError, UnsafeError
from padconvert.load.attributes import check_attributes
from padconvert.load.extent import check_extent, check_names
from padconvert.load.names import resolve
from padconvert.load.nodes import (
    MemberNode,
    NameNode,
    Node,
    ObjectNode,
    Plain,
    PlainNode,
    RefusedNode,
    Series,
    SeriesNode,
    StorageNode,
    Table,
    TableNode,
    TensorNode,
    Value,
    walk,
)
from padconvert.load.reductions import DTYPE_NAMES

_MISSING = object()
_MOST_LAYERS = 10_000
_MEMBERS = {"_parameters": nn.Parameter, "_buffers": Tensor, "_modules": nn.Module}
#: a member under one of these names would be in the way when the module uses its own attribute
_RESERVED = frozenset(vars(nn.Module()))
_TENSOR_STATE = (bool, int, float, str, type(None))

# what torch.nn.Module calls out of its own attributes
_CODE_KEYS = frozenset(key for key in vars(nn.Module()) if "_hooks" in key) | {
    "_compiled_call_impl", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks",
}  # fmt: skip

_SERIES: dict[Series, Callable[[list[Any]], Any]] = {
    Series.LIST: list, Series.TUPLE: tuple, Series.SET: set, Series.FROZENSET: frozenset, Series.DEQUE: deque,
}  # fmt: skip
_PLAIN: dict[Plain, Callable[..., Any]] = {
    Plain.SLICE: slice, Plain.RANGE: range, Plain.DEVICE: torch.device, Plain.COMPLEX: complex,
    Plain.BYTEARRAY: bytearray, Plain.SIZE: lambda *sizes: torch.Size(sizes),
}  # fmt: skip


def build(root: Value, tensor: Callable[[TensorNode], Tensor], trust: tuple[str, ...], where: str) -> Any:
    """The object that the tree describes; `tensor` gives the values of a tensor node.

    Raises UnsafeError where a rule is broken, FileError where the tree does not make sense.
    """
    return _Builder(tensor, trust, where).run(root)


def _holds_nothing(value: Value) -> bool:
    match value:
        case None | False | True | TableNode(pairs=[]) | SeriesNode(items=[]):
            return True
        case _:
            return False


class _Builder:
    def __init__(self, tensor: Callable[[TensorNode], Tensor], trust: tuple[str, ...], where: str) -> None:
        self.tensor = tensor
        self.trust = trust
        self.where = where
        self.made: dict[int, Any] = {}
        self.classes: dict[str, Any] = {}

    def run(self, root: Value) -> Any:
        nodes = walk(root)
        for node in nodes:
            self.check(node)
        check_extent(nodes, self.where)
        # containers first, empty, because cycles run through them; then what cannot change; then the contents
        for node in nodes:
            self.make_empty(node)
        for node in nodes:
            self.make_fixed(node)
        for node in nodes:
            self.fill(node)
        for node in nodes:
            self.set_state(node)
        for node in nodes:
            self.check_made(node)
        made = self.value(root)
        if isinstance(made, nn.Module):
            check_names(made, self.where)
            check_attributes(made, self.where)
        return made

    def refuse(self, what: str) -> NoReturn:
        raise UnsafeError(f"{self.where}: {what}. Save its state dict and name a factory with --arch.")

    def value(self, value: Value) -> Any:
        return self.made[id(value)] if isinstance(value, Node) else value

    # checks

    def check(self, node: Node) -> None:
        match node:
            case RefusedNode(name=name, why=why):
                raise UnsafeError(f"{self.where}: {name.full}: {why}; {hint(name.module, name.name)}.")
            case StorageNode():
                raise FileError(f"{self.where}: it holds a bare storage. Save the tensors, not their storages.")
            case ObjectNode():
                self.check_object(node)
            case NameNode():
                self.check_name(node)
            case TableNode(state=state):
                self.check_table(node, state)
            case SeriesNode(kind=Series.SET | Series.FROZENSET, items=items):
                self.check_keys(items)
            case TensorNode(state=state):
                self.check_tensor_state(state)

    def check_name(self, node: NameNode) -> None:
        """A class or function that stands as a value: a layer's class, a listed function, or trusted code."""
        found = self.named(node)
        if isinstance(found, torch.dtype) or node.full in FUNCTIONS or node.full in TYPES:
            return
        if not inside(node.module, self.trust) and not (inspect.isclass(found) and issubclass(found, nn.Module)):
            self.refuse(f"{node.full} stands as a value, but it is no layer's class and not on the list of functions")

    def check_table(self, node: TableNode, state: TableNode | None) -> None:
        self.check_keys([key for key, _ in node.pairs])
        if state is not None and (node.kind is not Table.ORDERED or [key for key, _ in state.pairs] != ["_metadata"]):
            self.refuse("a dict carries attributes of its own")
        if node.factory is not None and node.factory.full not in TYPES:
            self.refuse(f"a defaultdict would call {node.factory.full}")

    def check_keys(self, keys: list[Value]) -> None:
        """Keys are scalars, names or short tuples of those: hashing them costs nothing and calls nothing."""
        for key in keys:
            flat = key.items if isinstance(key, SeriesNode) and key.kind is Series.TUPLE else [key]
            if any(isinstance(item, Node) and not self.is_plain_key(item) for item in flat):
                self.refuse("a key of a dict or set is not a plain value")

    def is_plain_key(self, item: Node) -> bool:
        if isinstance(item, PlainNode):
            return item.kind not in (Plain.SLICE, Plain.BYTEARRAY)
        return isinstance(item, NameNode)

    def check_tensor_state(self, state: TableNode | None) -> None:
        for key, value in state.pairs if state else []:
            if not isinstance(key, str) or hasattr(nn.Parameter, key) or not isinstance(value, _TENSOR_STATE):
                self.refuse(f"a tensor carries an attribute {key!r} that is not a plain value of its own")

    def check_object(self, node: ObjectNode) -> None:
        cls = self.named(node.cls)
        self.check_class(cls, node.cls)
        for key, value in node.state.pairs if node.state else []:
            if not isinstance(key, str) or (key.startswith("__") and key.endswith("__")):
                self.refuse(f"a {node.cls.name} carries {key!r} among its attributes, which would change its class")
            self.check_attribute(cls, node, key, value)
        if issubclass(cls, nn.Module):
            self.check_module(node)
        if issubclass(cls, nn.RNNBase):
            self.check_recurrent(node)

    def check_class(self, cls: Any, name: NameNode) -> None:
        if not inspect.isclass(cls):
            self.refuse(f"{name.full} stands where a class belongs")
        if name.module.startswith("torch.nn.modules") and not issubclass(cls, nn.Module):
            self.refuse(f"{name.full} is not a layer")
        if cls.__new__ is not object.__new__ or hasattr(cls, "__del__"):
            self.refuse(f"{name.full} cannot be made without running its own code (__new__ or __del__)")
        if inspect.isabstract(cls) or not hasattr(cls, "__dict__") or getattr(cls, "__dictoffset__", 0) == 0:
            self.refuse(f"{name.full} has no place for attributes")
        own = getattr(cls, "__setstate__", None)
        # torch.compile puts its own in place of nn.Module's, for the whole process
        known = own is None or own is nn.Module.__setstate__
        if not known and not str(getattr(own, "__module__", "")).startswith("torch.nn.modules."):
            self.refuse(f"{name.full} restores itself by its own code (__setstate__), which this reader never runs")

    def check_attribute(self, cls: Any, node: ObjectNode, key: str, value: Value) -> None:
        known = inspect.getattr_static(cls, key, _MISSING)
        if known is not _MISSING and (callable(known) or hasattr(type(known), "__get__")):
            self.refuse(
                f"a {node.cls.name} carries {key!r} among its attributes, which would hide a method of its class"
            )
        if issubclass(cls, nn.Module) and key in _CODE_KEYS and not _holds_nothing(value):
            raise UnsafeError(
                f"{self.where}: a {node.cls.name} carries hooks ({key}), which are code. "
                "Remove them and save the model again, or save its state dict and name a factory with --arch."
            )

    def check_module(self, node: ObjectNode) -> None:
        state = dict(node.state.pairs) if node.state else {}
        for key in _MEMBERS:
            table = state.get(key)
            if not isinstance(table, TableNode) or table.kind not in (Table.DICT, Table.ORDERED):
                raise FileError(f"{self.where}: a {node.cls.name} has no {key}. Save the model again.")
            for name, _ in table.pairs:
                if not isinstance(name, str) or not name or "." in name or name in _RESERVED:
                    raise FileError(f"{self.where}: {name!r} among the {key} of a {node.cls.name} is not a name.")

    def check_recurrent(self, node: ObjectNode) -> None:
        """torch's own `__setstate__` of these layers names the weights of each of so many."""
        layers = dict(node.state.pairs).get("num_layers") if node.state else None
        if type(layers) is not int or not 1 <= layers <= _MOST_LAYERS:
            raise FileError(f"{self.where}: a {node.cls.name} has no number of layers that a network has.")

    def named(self, name: NameNode) -> Any:
        if name.full not in self.classes:
            dtype = DTYPE_NAMES.get(name.name) if name.module == "torch" else None
            self.classes[name.full] = getattr(torch, dtype) if dtype else resolve(name, self.trust, self.where)
        return self.classes[name.full]

    # objects

    def make_empty(self, node: Node) -> None:
        match node:
            case SeriesNode(kind=Series.LIST | Series.SET):
                self.made[id(node)] = _SERIES[node.kind]([])
            case SeriesNode(kind=Series.DEQUE):
                self.made[id(node)] = deque(maxlen=node.maxlen)
            case TableNode():
                self.made[id(node)] = self.empty_table(node)
            case ObjectNode(cls=name):
                self.made[id(node)] = object.__new__(self.named(name))

    def empty_table(self, node: TableNode) -> Any:
        match node.kind:
            case Table.DICT:
                return {}
            case Table.ORDERED:
                return OrderedDict()
            case Table.COUNTER:
                return Counter()
            case Table.DEFAULT:
                return defaultdict(self.named(node.factory) if node.factory else None)

    def make_fixed(self, node: Node) -> None:
        if id(node) in self.made:
            return
        match node:
            case SeriesNode(kind=Series.TUPLE | Series.FROZENSET):
                self.make_nested(node)
            case PlainNode():
                self.made[id(node)] = self.plain(node)
            case NameNode():
                self.made[id(node)] = self.named(node)
            case MemberNode():
                self.made[id(node)] = self.member(node)
            case TensorNode():
                self.made[id(node)] = self.tensor_of(node)

    def make_nested(self, node: SeriesNode) -> None:
        """Tuples inside tuples, innermost first. A tuple that holds itself is refused."""
        open_: dict[int, SeriesNode] = {id(node): node}
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [i for i in top.items if isinstance(i, Node) and id(i) not in self.made]
            inner = next((item for item in waiting if isinstance(item, SeriesNode)), None)
            if inner is None:
                for item in waiting:
                    self.make_fixed(item)
                self.made[id(top)] = _SERIES[top.kind]([self.value(item) for item in top.items])
                stack.pop()
            elif id(inner) in open_:
                raise FileError(f"{self.where}: a tuple holds itself. The file is damaged.")
            else:
                open_[id(inner)] = inner
                stack.append(inner)

    def plain(self, node: PlainNode) -> Any:
        try:
            return _PLAIN[node.kind](*node.args)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise FileError(f"{self.where}: a {node.kind.value} that makes no sense ({error}).") from error

    def member(self, node: MemberNode) -> Any:
        cls = self.named(node.cls)
        if not isinstance(cls, type) or not issubclass(cls, enum.Enum):
            self.refuse(f"{node.cls.full} would be called, and the reader calls nothing")
        for member in cls:
            if (member.name if node.by_name else member.value) == node.key:
                return member
        raise FileError(f"{self.where}: {node.cls.full} has no member {node.key!r} in the version installed here.")

    def tensor_of(self, node: TensorNode) -> Tensor:
        made = self.tensor(node)
        if node.parameter:
            if node.requires_grad and not (made.is_floating_point() or made.is_complex()):
                raise FileError(f"{self.where}: a trainable parameter of whole numbers. The file is damaged.")
            made = nn.Parameter(made, requires_grad=node.requires_grad)
        elif node.requires_grad:
            made = made.detach().requires_grad_()
        for key, value in node.state.pairs if node.state else []:
            setattr(made, str(key), value)
        return made

    def fill(self, node: Node) -> None:
        made: Any = self.made.get(id(node))
        match node:
            case SeriesNode(kind=Series.LIST | Series.DEQUE):
                made.extend(self.value(item) for item in node.items)
            case SeriesNode(kind=Series.SET):
                made.update(self.value(item) for item in node.items)
            case TableNode():
                for key, value in node.pairs:
                    made[self.value(key)] = self.value(value)
                if node.state is not None:
                    made._metadata = self.value(node.state.pairs[0][1])

    def set_state(self, node: Node) -> None:
        if not isinstance(node, ObjectNode) or node.state is None:
            return
        made, state = self.made[id(node)], self.made[id(node.state)]
        if not isinstance(made, nn.Module):
            made.__dict__.update(state)
            return
        try:
            made.__setstate__(state)
        except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
            raise FileError(f"{self.where}: the state of a {node.cls.name} is incomplete ({error!r}).") from error

    def check_made(self, node: Node) -> None:
        made = self.made.get(id(node))
        if not isinstance(node, ObjectNode) or not isinstance(made, nn.Module):
            return
        for attribute, kind in _MEMBERS.items():
            for name, member in made.__dict__[attribute].items():
                if member is not None and not isinstance(member, kind):
                    raise FileError(f"{self.where}: {name!r} of a {node.cls.name} is not a {kind.__name__}.")
