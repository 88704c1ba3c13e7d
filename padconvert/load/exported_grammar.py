"""The words of an exported program: names, sizes as expressions, and how inputs and outputs are nested.

torch pastes names into code that it generates, hands expressions to `sympify`, which evaluates them, and imports what a
treespec names. None of that happens here: nothing below calls more than a parser, and what passes is plain data.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from typing import Any

from padconvert.errors import FileError, UnsafeError

# What reading a value of another type than expected raises.
MALFORMED = (AttributeError, TypeError, KeyError, IndexError, ValueError, RecursionError)

MAX_NAME = 512
MAX_EXPRESSION = 4096
MAX_DEPTH = 64
_MAX_NODES = 1000
_MAX_POWER = 8
_MAX_NUMBER = 2**63
_MAX_TREE = 1 << 20

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PART = re.compile(r"[A-Za-z0-9_\-]+\Z")
_SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,5}\Z", re.ASCII)
_FLOAT = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?\Z", re.ASCII)
_TEXT = re.compile(r"[\w .,:;/|()\[\]<>=*+-]*\Z", re.ASCII)
_KEY = re.compile(r"[\w .\-]{1,200}\Z", re.ASCII)

# How torch writes a size: `srepr` of sympy's classes and of torch's own functions on sizes.
_FUNCTIONS = """
Add Mul Pow Integer Rational Max Min Mod Abs And Or Not Xor ITE Piecewise ExprCondPair Equality Eq Unequality Ne
GreaterThan StrictGreaterThan LessThan StrictLessThan Ge Gt Le Lt Tuple floor ceiling FloorDiv ModularIndexing Where
PythonMod CleanDiv CeilToInt FloorToInt CeilDiv PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt
IsNonOverlappingAndDenseIndicator RoundToInt RoundDecimal ToFloat Identity
"""
_FUNCTION_NAMES = frozenset(_FUNCTIONS.split())
_POWERS = ("Pow", "PowByNatural")
_WORDS = frozenset({"true", "false", "oo"})
_ASSUMPTION_WORDS = "positive negative nonnegative nonpositive nonzero integer real finite rational"
_ASSUMPTIONS = frozenset(_ASSUMPTION_WORDS.split())
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def shown(text: object) -> str:
    """A value out of a file, safe to print in a message."""
    return repr(text)[:80]


def check_identifier(name: object, what: str, where: str) -> str:
    """A name that may become a variable. Raises UnsafeError: names end up in generated code."""
    if (
        not isinstance(name, str)
        or len(name) > MAX_NAME
        or not _IDENTIFIER.match(name)
        or keyword.iskeyword(name)
        or name.startswith("__")
    ):
        raise UnsafeError(f"{where}: {what} {shown(name)} is not a plain name. {EXPORT_AGAIN}")
    return name


def check_path(name: object, what: str, where: str) -> str:
    """A dotted name of a parameter or buffer. Raises UnsafeError."""
    parts = name.split(".") if isinstance(name, str) and 0 < len(name) <= MAX_NAME else [""]
    if not all(_PART.match(part) and not part.startswith("__") for part in parts):
        raise UnsafeError(f"{where}: {what} {shown(name)} is not a plain dotted name. {EXPORT_AGAIN}")
    return str(name)


def is_symbol(name: object) -> bool:
    """Whether this is what torch calls a size that may vary, as s77."""
    return isinstance(name, str) and _SYMBOL.match(name) is not None


def check_text(text: object, where: str) -> str:
    """A string among an operation's arguments, as "bij,bjk->bik". Raises UnsafeError."""
    if not isinstance(text, str) or len(text) > MAX_NAME or not _TEXT.match(text):
        raise UnsafeError(f"{where}: the string {shown(text)} is no argument of a tensor operation. {EXPORT_AGAIN}")
    return text


EXPORT_AGAIN = "Take the file from a source that you trust, or export the model again with torch.export.save."


# ---- expressions -------------------------------------------------------------------------------------------------


def check_expression(text: object, where: str) -> str:
    """A size such as "Mul(Integer(2), Symbol('s77', positive=True, integer=True))": sums, products, comparisons and
    torch's own functions on sizes, nothing else. Raises UnsafeError for all others; evaluates nothing."""
    try:
        if not isinstance(text, str) or not text.isascii() or "\\" in text or len(text) > MAX_EXPRESSION:
            raise ValueError
        tree = ast.parse(text, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
            raise ValueError
        _check_node(tree.body, 0)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UnsafeError(
            f"{where}: the size {shown(text)} is no expression of sizes; torch would evaluate it. {EXPORT_AGAIN}"
        ) from None
    return text


def _check_node(node: ast.expr, depth: int) -> None:
    """Raises ValueError where the node is not part of the grammar."""
    if depth > MAX_DEPTH:
        raise ValueError
    match node:
        case ast.Constant(value=value):
            _check_number(value)
        case ast.Name(id=name) if name in _WORDS or _SYMBOL.match(name):
            pass
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _OPERATORS):
            _check_node(operand, depth + 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            _check_power(left, right, depth)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATORS):
            _check_node(left, depth + 1)
            _check_node(right, depth + 1)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if isinstance(op, _COMPARISONS):
            _check_node(left, depth + 1)
            _check_node(right, depth + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            _check_call(name, args, keywords, depth)
        case _:
            raise ValueError


def _check_number(value: object) -> None:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < _MAX_NUMBER):
        return
    if not isinstance(value, float):
        raise ValueError


def _check_call(name: str, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> None:
    if name in ("Symbol", "Float"):
        _check_leaf(name, args, keywords)
        return
    if name not in _FUNCTION_NAMES or keywords:
        raise ValueError
    if name in _POWERS:
        base, exponent = args
        _check_power(base, exponent, depth)
        return
    for arg in args:
        _check_node(arg, depth + 1)


def _check_leaf(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> None:
    """`Symbol('s77', positive=True, integer=True)` or `Float('1.0', precision=53)`."""
    (arg,) = args
    pattern = _SYMBOL if name == "Symbol" else _FLOAT
    if not isinstance(arg, ast.Constant) or not isinstance(arg.value, str) or not pattern.match(arg.value):
        raise ValueError
    for word in keywords:
        value = word.value.value if isinstance(word.value, ast.Constant) else None
        known = word.arg in _ASSUMPTIONS if name == "Symbol" else word.arg == "precision"
        if not known or not (isinstance(value, bool) if name == "Symbol" else value in (24, 53)):
            raise ValueError


def _check_power(base: ast.expr, exponent: ast.expr, depth: int) -> None:
    """A small constant exponent, and no power of a power: numbers stay small when sympy multiplies them out."""
    match exponent:
        case ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            exponent = inner
        case _:
            pass
    if abs(ast.literal_eval(exponent)) > _MAX_POWER:
        raise ValueError
    for node in ast.walk(base):
        if isinstance(node, ast.Pow) or (isinstance(node, ast.Name) and node.id in _POWERS):
            raise ValueError
    _check_node(base, depth + 1)


# ---- how inputs and outputs are nested ---------------------------------------------------------------------------

LEAF = "*"
_SEQUENCES = {
    "builtins.tuple": "tuple",
    "builtins.list": "list",
    "torch.fx.immutable_collections.immutable_list": "list",
}
_MAPPINGS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")
_OUTPUT_CLASSES = "transformers."


def read_treespec(text: object, where: str, *, outputs: bool) -> Any:
    """A treespec as plain JSON: "*" for a leaf, ["tuple", [...]], ["list", [...]], ["dict", [[key, …], …]].

    An output class that transformers registers becomes a dict of its fields. Raises UnsafeError for every other class,
    for to find it torch would import what the file names; FileError where the text is damaged.
    """
    if not isinstance(text, str) or len(text) > _MAX_TREE:
        raise FileError(f"{where}: its call is described in an unknown way. {EXPORT_AGAIN}")
    try:
        version, root = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise FileError(f"{where}: its call is described in an unknown way. {EXPORT_AGAIN}") from None
    if version != 1:
        raise FileError(f"{where}: its call is described in version {shown(version)}; 1 is known here. {EXPORT_AGAIN}")
    return _tree(root, where, outputs, 0)


def _tree(spec: object, where: str, outputs: bool, depth: int) -> Any:
    if not isinstance(spec, dict) or depth > MAX_DEPTH or not isinstance(spec.get("children_spec"), list):
        raise FileError(f"{where}: its call is described in an unknown way. {EXPORT_AGAIN}")
    kind, context = spec.get("type"), spec.get("context")
    if kind is None and context is None and not spec["children_spec"]:
        return LEAF
    children = [_tree(child, where, outputs, depth + 1) for child in spec["children_spec"]]
    if kind in _SEQUENCES and context in ("null", None):
        return [_SEQUENCES[kind], children]
    if kind in _MAPPINGS or (outputs and isinstance(kind, str) and kind.startswith(_OUTPUT_CLASSES)):
        keys = _keys(context, len(children))
        if keys is not None:
            return ["dict", [list(pair) for pair in zip(keys, children, strict=True)]]
    raise _foreign_class(kind, context, where)


def _keys(context: object, count: int) -> list[str] | None:
    """The keys of a mapping, or None where the context is anything but a list of plain words."""
    try:
        keys = json.loads(context) if isinstance(context, str) and len(context) < _MAX_TREE else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str) and _KEY.match(key) for key in keys):
        return None
    return keys if len(keys) == count and len(set(keys)) == count else None


def _foreign_class(kind: object, context: object, where: str) -> UnsafeError:
    return UnsafeError(
        f"{where}: its inputs or outputs are held by {shown(kind)} ({shown(context)}), which torch would look up and "
        "import. Export the model again with tuples and dicts of tensors (a transformers decoder with use_cache=False)."
    )


def check_tree(tree: object, where: str, depth: int = 0) -> int:
    """The number of leaves of a tree in the form of `read_treespec`. Raises FileError where it is another form."""
    if tree == LEAF:
        return 1
    match tree:
        case ["tuple" | "list", list(children)] if depth < MAX_DEPTH:
            return sum(check_tree(child, where, depth + 1) for child in children)
        case ["dict", list(pairs)] if depth < MAX_DEPTH:
            count, keys = 0, set()
            for pair in pairs:
                match pair:
                    case [str(key), child] if _KEY.match(key) and key not in keys:
                        keys.add(key)
                        count += check_tree(child, where, depth + 1)
                    case _:
                        raise UnsafeError(f"{where}: {shown(pair)} is no entry of a dict of tensors. {EXPORT_AGAIN}")
            return count
        case _:
            raise FileError(f"{where}: {shown(tree)} does not say how tensors are nested. {EXPORT_AGAIN}")
