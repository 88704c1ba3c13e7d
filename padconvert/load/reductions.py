"""What a REDUCE opcode means, as data: a table from the function's name to the node it would have made.

Each entry reads its arguments as they stand in the pickle. Nothing is called; what is not in the table is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from padconvert.allow import FUNCTIONS
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
    View,
)

# Typed storages as torch writes them into pickles, by the dtype of their entries.
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
DTYPE_NAMES = {**{name: name for name in DTYPE_BYTES}, "half": "float16", "float": "float32", "double": "float64",
               "long": "int64", "int": "int32", "short": "int16"}  # fmt: skip


_QUANTISED = {"QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"}


class Refusal(Exception):
    """Why this call is not read as data."""


Args = list[Value]


def rebuilt(function: NameNode, args: Args) -> Value:
    """The node that stands for `function(*args)`. Raises Refusal where there is none."""
    handler = _TABLE.get(function.full)
    if handler is not None:
        return handler(args)
    if len(args) == 1 and isinstance(args[0], int | str):
        # how an Enum's member is pickled; whether the class is one is checked when it is built
        return MemberNode(function, args[0], by_name=False)
    raise Refusal("it would be called, and the reader calls nothing")


def persistent(pid: Value) -> Node:
    """The node for a persistent id: a storage, a class of the legacy format, or a numbered tensor."""
    match pid:
        case SeriesNode(kind=Series.TUPLE, items=["tensor", int(number)]):
            return TensorNode(number)
        case SeriesNode(kind=Series.TUPLE, items=["module", NameNode() as cls, *_]):
            return cls
        case SeriesNode(kind=Series.TUPLE, items=["storage", kind, str() | int() as key, str(), int(entries), *view]):
            return _storage(kind, str(key), entries, view)
        case _:
            raise ValueError("a persistent id that torch does not write")


# Protocol 0 knows no tuple as a persistent id, so pickle writes Python's own text of it: a storage, or in the legacy
# format a class with its source. Both are taken apart by one pattern each, and nothing else is read.
_STORAGE_TEXT = re.compile(
    r"\('storage', <class '(torch(?:\.[A-Za-z]{1,40}){0,3})\.(\w{1,80})'>, "
    r"'(\d{1,20})', '[\w:]{1,40}', (\d{1,18})(?:, None)?\)",
    re.ASCII,
)
_CLASS_TEXT = re.compile(r"\('module', <class '((?:\w{1,200}\.){1,40})(\w{1,200})'>, .*\)", re.ASCII | re.DOTALL)
_RESAVE = "it was saved with pickle protocol 0, in a form that cannot be read; save it again with the default protocol"


def spelled(text: str, named: Callable[[str, str], NameNode]) -> SeriesNode:
    """A persistent id of protocol 0 as the tuple it is the text of; `named` makes the node of a class.

    Raises Refusal for any other text than torch's own.
    """
    if found := _STORAGE_TEXT.fullmatch(text):
        kind = named(found[1], found[2])
        return SeriesNode(Series.TUPLE, ["storage", kind, found[3], "cpu", int(found[4])])
    if found := _CLASS_TEXT.fullmatch(text):
        return SeriesNode(Series.TUPLE, ["module", named(found[1].removesuffix("."), found[2])])
    raise Refusal(_RESAVE)


def _storage(kind: Value, key: str, entries: int, view: Args) -> StorageNode:
    if not isinstance(kind, NameNode) or entries < 0:
        raise ValueError("a storage without a type or size")
    if kind.full in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        dtype = None
    elif kind.module in ("torch", "torch.cuda") and kind.name in STORAGE_DTYPES:
        dtype = STORAGE_DTYPES[kind.name]
    elif kind.module == "torch" and kind.name in _QUANTISED:
        raise Refusal("its tensors are quantised, and quantised models cannot be converted; start from the float model")
    else:
        raise ValueError(f"storage type {kind.full} is not supported")
    match view:
        case [] | [None]:
            return StorageNode(key, dtype, entries)
        case [SeriesNode(items=[_, int(offset), int(size)])] if offset >= 0 and 0 <= size <= entries - offset:
            return StorageNode(key, dtype, entries, offset)
        case _:
            raise ValueError("a storage view outside its storage")


# tensors


def _tensor(args: Args) -> TensorNode:
    """`torch._utils._rebuild_tensor(storage, offset, size, stride)` and `_v2(…, requires_grad, hooks, metadata)`."""
    match args:
        case [StorageNode(dtype=str(dtype)) as storage, int(offset), size, stride, *rest]:
            return _viewed(storage, dtype, offset, size, stride, rest)
        case _:
            raise Refusal("its arguments are not those of a tensor")


def _tensor_v3(args: Args) -> TensorNode:
    """`_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)`."""
    match args:
        case [StorageNode(dtype=None) as storage, int(offset), size, stride, grad, hooks, NameNode() as dtype, *rest]:
            name = DTYPE_NAMES.get(dtype.name)
            if dtype.module != "torch" or name is None:
                raise Refusal(f"dtype {dtype.full} is not supported")
            return _viewed(storage, name, offset, size, stride, [grad, hooks, *rest])
        case _:
            raise Refusal("its arguments are not those of a tensor")


def _viewed(storage: StorageNode, dtype: str, offset: int, size: Value, stride: Value, rest: Args) -> TensorNode:
    grad = bool(rest[0]) if rest else False
    if len(rest) > 1 and not _empty(rest[1]):
        raise Refusal("it carries hooks")
    if len(rest) > 2 and not _empty(rest[2]):
        raise Refusal("lazy conjugate or negative views are not supported")
    view = View(storage.key, dtype, storage.offset + offset, _counts(size), _counts(stride))
    return TensorNode(view, requires_grad=grad)


def _counts(value: Value) -> tuple[int, ...]:
    items: list[Value] | tuple[Value, ...]
    match value:
        case SeriesNode(kind=Series.TUPLE | Series.LIST, items=items):
            pass
        case PlainNode(kind=Plain.SIZE, args=args):
            items = args
        case _:
            raise Refusal("its size is not a tuple")
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise Refusal("its size is not made of whole numbers")
    return tuple(item for item in items if isinstance(item, int))


def _empty(value: Value) -> bool:
    match value:
        case None | False | TableNode(pairs=[], state=None) | SeriesNode(items=[]):
            return True
        case _:
            return False


def _parameter(args: Args) -> TensorNode:
    """`_rebuild_parameter(data, requires_grad, hooks)` and `_rebuild_parameter_with_state(…, state)`."""
    match args:
        case [TensorNode(state=None) as data, bool(grad), hooks, *rest] if len(rest) <= 1:
            if not _empty(hooks):
                raise Refusal("it carries hooks")
            return TensorNode(data.source, parameter=True, requires_grad=grad, state=_state(rest))
        case _:
            raise Refusal("its arguments are not those of a parameter")


def _state(rest: Args) -> TableNode | None:
    match rest:
        case [] | [None]:
            return None
        case [TableNode() as table]:
            return table
        case [SeriesNode(items=[TableNode() as table, second])] if _empty(second):
            return table
        case _:
            raise Refusal("its state is not a plain dict")


def _from_type(args: Args) -> TensorNode:
    """`torch._tensor._rebuild_from_type_v2(function, type, args, state)`, for plain tensors and parameters."""
    match args:
        case [NameNode() as function, NameNode() as cls, SeriesNode(items=items), state]:
            made = rebuilt(function, items)
        case _:
            raise Refusal("its arguments are not those of a tensor")
    if not isinstance(made, TensorNode) or made.state is not None:
        raise Refusal("it is not a plain tensor")
    if cls.full not in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        raise Refusal(f"tensors of type {cls.full} are not supported")
    made.parameter = made.parameter or cls.name == "Parameter"
    made.state = None if _empty(state) else _state([state])
    return made


# collections and small values


def _items(args: Args) -> list[Value]:
    match args:
        case []:
            return []
        case [SeriesNode(items=items)]:
            return items
        case _:
            raise Refusal("its argument is not a plain list")


def _set(args: Args) -> SeriesNode:
    return SeriesNode(Series.SET, list(_items(args)))


def _frozenset(args: Args) -> SeriesNode:
    return SeriesNode(Series.FROZENSET, list(_items(args)))


def _deque(args: Args) -> SeriesNode:
    match args:
        case [SeriesNode() as items, int(maxlen)] if 0 <= maxlen < 1 << 31:
            return SeriesNode(Series.DEQUE, list(items.items), maxlen)
        case _:
            return SeriesNode(Series.DEQUE, list(_items(args)))


def _ordered(args: Args) -> TableNode:
    pairs: list[tuple[Value, Value]] = []
    for item in _items(args):
        match item:
            case SeriesNode(items=[key, value]):
                pairs.append((key, value))
            case _:
                raise Refusal("its items are not pairs")
    return TableNode(Table.ORDERED, pairs)


def _default(args: Args) -> TableNode:
    match args:
        case [] | [None]:
            return TableNode(Table.DEFAULT, [])
        case [NameNode() as factory]:
            return TableNode(Table.DEFAULT, [], factory)
        case _:
            raise Refusal("its factory is not a plain type")


def _counter(args: Args) -> TableNode:
    match args:
        case []:
            return TableNode(Table.COUNTER, [])
        case [TableNode(kind=Table.DICT) as table]:
            return TableNode(Table.COUNTER, table.pairs)
        case _:
            raise Refusal("its argument is not a plain dict")


def _scalars(args: Args) -> tuple[Scalar, ...]:
    scalars = [arg for arg in args if arg is None or isinstance(arg, bool | int | float | str | bytes)]
    if len(scalars) != len(args):
        raise Refusal("its arguments are not plain numbers")
    return tuple(scalars)


def _plain(kind: Plain, least: int, most: int) -> Callable[[Args], PlainNode]:
    def make(args: Args) -> PlainNode:
        if not least <= len(args) <= most:
            raise Refusal("it has the wrong number of arguments")
        return PlainNode(kind, _scalars(args))

    return make


def _size(args: Args) -> PlainNode:
    return PlainNode(Plain.SIZE, _counts(args[0] if args else SeriesNode(Series.TUPLE, [])))


def _bytearray(args: Args) -> PlainNode:
    match args:
        case [] | [bytes()]:
            return PlainNode(Plain.BYTEARRAY, _scalars(args))
        case _:
            raise Refusal("it would allocate what the file only names")


def _encode(args: Args) -> bytes:
    match args:
        case [str(text), "latin1" | "latin-1"]:
            return text.encode("latin1")
        case _:
            raise Refusal("its arguments are not those of a byte string")


def _reconstructor(args: Args) -> Node:
    """How protocols 0 and 1 write `object.__new__(cls)`."""
    match args:
        case [NameNode() as cls, NameNode(module="builtins", name="object"), None]:
            return ObjectNode(cls)
        case [NameNode() as cls, *_]:
            return RefusedNode(cls, "it is constructed with arguments")
        case _:
            raise Refusal("its arguments are not those of a plain object")


def _getattr(args: Args) -> Node:
    """Protocols below 4 write members of classes so: torch.tanh, and an Enum's member by its name."""
    match args:
        case [NameNode(module="torch._C", name="_VariableFunctionsClass"), str(name)] if f"torch.{name}" in FUNCTIONS:
            return NameNode("torch", name)
        case [NameNode() as cls, str(name)]:
            return MemberNode(cls, name, by_name=True)
        case _:
            raise Refusal("it would look up a name at load time")


_TABLE: dict[str, Callable[[Args], Value]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _plain(Plain.DEVICE, 1, 2),
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default,
    "collections.Counter": _counter,
    "collections.deque": _deque,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.slice": _plain(Plain.SLICE, 1, 3),
    "builtins.range": _plain(Plain.RANGE, 1, 3),
    "builtins.complex": _plain(Plain.COMPLEX, 2, 2),
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _getattr,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
}
# Names that these entries read as data; a name in the table or here asks for no permission.
DATA_NAMES = frozenset(_TABLE) | frozenset(
    ["builtins.object", "torch.storage.UntypedStorage", "torch.UntypedStorage", "torch._C._VariableFunctionsClass",
     "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"]
    + [f"torch.{name}" for name in (*STORAGE_DTYPES, *DTYPE_NAMES)]
    + [f"torch.cuda.{name}" for name in STORAGE_DTYPES]
)  # fmt: skip
