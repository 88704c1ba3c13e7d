"""Which sizes of an exported program's inputs may vary, and how far: kept beside its graph, for an export again.

In the document an input of `kind: user` says `symbols`, a list of [DIMENSION, NAME, TIMES, PLUS]: the dimension's size
is TIMES · the size called NAME + PLUS. `ranges` maps each such NAME to [LOW, HIGH], HIGH null where there is no limit.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from padconvert.export.sizes import BATCH, Axis, Place
from padconvert.load.exported_grammar import LEAF, is_symbol
from padconvert.walk.spec import ProbeSpec

_MAX = 2**48
Json = dict[str, Any]
Linear = tuple[str, int, int]


def symbols_of(sizes: Iterable[object]) -> list[list[Any]]:
    """`symbols` of an input, from its sizes as torch writes them; sizes of another form than a·s + b are left out."""
    found: list[list[Any]] = []
    for dim, size in enumerate(sizes):
        match size:
            case {"as_expr": {"expr_str": str(text)}}:
                linear = _linear(ast.parse(text, mode="eval").body)
                if linear is not None and linear[0] and 0 < linear[1] < _MAX and abs(linear[2]) < _MAX:
                    found.append([dim, *linear])
            case _:
                pass
    return found


def ranges_of(constraints: Mapping[str, object], inputs: Iterable[Json]) -> dict[str, list[Any]]:
    """`ranges` of the sizes that the inputs name, from torch's `range_constraints`."""
    names = {symbol[1] for given in inputs for symbol in given.get("symbols", ())}
    return {name: _range(constraints.get(name)) for name in sorted(names)}


def check_ranges(constraints: Mapping[str, object], damaged: Callable[[object], Exception]) -> None:
    """Raises `damaged(symbol)` where no size can be within torch's limits of it."""
    for symbol, constraint in constraints.items():
        limits = [constraint.get(key) for key in ("min_val", "max_val")] if isinstance(constraint, dict) else [()]
        numbers = [limit for limit in limits if limit is not None]
        if not all(type(number) is int for number in numbers) or numbers != sorted(numbers):
            raise damaged(f"the limits of {symbol}")


def _range(constraint: object) -> list[Any]:
    given = constraint if isinstance(constraint, dict) else {}
    low, high = given.get("min_val"), given.get("max_val")
    low = low if type(low) is int and 0 <= low < _MAX else 0
    return [low, high if type(high) is int and low <= high < _MAX else None]


def _linear(node: ast.expr) -> Linear | None:
    """An expression that passed `check_expression`, as (symbol or "", a, b) where it is a·symbol + b."""
    match node:
        case ast.Constant(value=int(value)):
            return "", 0, value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _product(("", 0, -1), _linear(operand))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return (name, 1, 0) if is_symbol(name) else None
        case ast.Call(func=ast.Name(id="Integer"), args=[inner]):
            return _linear(inner)
        case ast.Call(func=ast.Name(id="Add"), args=args):
            return _folded(_sum, args)
        case ast.Call(func=ast.Name(id="Mul"), args=args):
            return _folded(_product, args)
        case _:
            return None


def _folded(join: Callable[[Linear, Linear | None], Linear | None], nodes: list[ast.expr]) -> Linear | None:
    found = _linear(nodes[0]) if nodes else None
    for node in nodes[1:]:
        found = None if found is None else join(found, _linear(node))
    return found


def _sum(a: Linear, b: Linear | None) -> Linear | None:
    if b is None or (a[0] and b[0] and a[0] != b[0]):
        return None
    return a[0] or b[0], a[1] + b[1], a[2] + b[2]


def _product(a: Linear, b: Linear | None) -> Linear | None:
    if b is None or (a[0] and b[0]):
        return None
    number, other = (b, a) if a[0] else (a, b)
    return other[0], other[1] * number[2], other[2] * number[2]


# ---- the document's --------------------------------------------------------------------------------------------------


def check_sizes(document: Json, require: Callable[[bool, object], None]) -> None:
    """Hold `symbols` and `ranges`, which older documents lack, by `require`."""
    ranges = document.get("ranges", {})
    require(isinstance(ranges, dict), ranges)
    for name, limits in ranges.items():
        require(is_symbol(name) and isinstance(limits, list) and len(limits) == 2, name)
        low, high = limits
        require(type(low) is int and 0 <= low < _MAX, low)
        require(high is None or (type(high) is int and low <= high < _MAX), high)
    for given in document["inputs"]:
        symbols = given.get("symbols", [])
        require(isinstance(symbols, list) and (not symbols or given["kind"] == "user"), symbols)
        for symbol in symbols:
            require(isinstance(symbol, list) and len(symbol) == 4, symbol)
            dim, name, times, plus = symbol
            require(type(dim) is int and dim in given["dynamic"], dim)
            require(isinstance(name, str) and name in ranges, name)
            require(type(times) is int and 0 < times < _MAX and type(plus) is int and abs(plus) < _MAX, symbol)


def promised_axes(document: Json, probe: ProbeSpec) -> tuple[Axis, ...]:
    """The sizes that the program leaves open, where the probe's inputs have them. A document that names no symbols
    promises none."""
    given = _by_word(document)
    words = list(given)
    positional = [number for number, spec in enumerate(probe.inputs) if spec.name is None]
    places: dict[str, list[Place]] = {}
    for number, spec in enumerate(probe.inputs):
        at = positional.index(number) if spec.name is None else -1
        word = spec.name if spec.name is not None else (words[at] if at < len(words) else "")
        for dim, name, times, plus in (given.get(word) or {}).get("symbols", ()):
            if dim <= len(spec.shape):
                places.setdefault(name, []).append(Place(number, dim, times, plus))
    return tuple(_axis(tuple(found), document["ranges"][name], probe) for name, found in places.items())


def _axis(places: tuple[Place, ...], limits: list[Any], probe: ProbeSpec) -> Axis:
    low, high = limits
    first = next((place for place in places if place.dim), places[0])
    size = BATCH if not first.dim else (probe.inputs[first.input].shape[first.dim - 1] - first.plus) // first.times
    # torch takes the sizes 0 and 1 for constants
    traced = max(size, low, 2)
    return Axis(places, traced if high is None else min(traced, high), low, high, promised=True)


def _by_word(document: Json) -> dict[str, Json | None]:
    """The program's arguments in order: what it was exported with, None for one that is not a single tensor."""
    _, [[_, positional], [_, named]] = document["call"]["given"]
    trees = [*positional, *(tree for _, tree in named)]
    words = document["call"]["names"]
    if len(words) != len(trees):
        words = [*(f"args_{i}" for i in range(len(positional))), *(key for key, _ in named)]
    users = [given for given in document["inputs"] if given["kind"] in ("user", "value")]
    if any(tree != LEAF for tree in trees):
        return {}
    return dict(zip(words, users, strict=True))
