"""Name patterns of rules, and which regular expressions may stand in one: those that end on any name.

Python's `re` tries all ways to match. Their number grows exponentially where repeats nest, and as a power where they
follow one another, so both are bounded. Globs need no bound: `fnmatch` matches them without going back.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

MAX_PATTERN = 200  # characters
MAX_REPEATS = 4  # repeats that follow one another: at most n⁴ ways through a name of n characters
MAX_WAYS = 1_000  # ways through the alternatives and optional parts

_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def name_matcher(pattern: str) -> Callable[[str], bool]:
    """A predicate on layer names: `re:` patterns must match the whole name, anything else is a glob.

    Raises ValueError where a `re:` pattern does not compile, may not end, or is longer than `MAX_PATTERN`.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"the pattern has {len(pattern)} characters; {MAX_PATTERN} are allowed")
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    expression = pattern.removeprefix("re:")
    try:
        compiled = re.compile(expression)
        _check_ends(expression, pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return lambda name: compiled.fullmatch(name) is not None


def _check_ends(expression: str, pattern: str) -> None:
    """Raises ValueError for an expression that could take forever on some name."""
    repeats, ways = 0, 1
    # the parser has no public name, but it is what `re.compile` itself reads with
    for kind, argument in _steps(import_module("re._parser").parse(expression)):
        if kind in _REPEATS and _is_endless(argument):
            raise ValueError(
                f"{pattern!r} may take forever to match: a repeat holds a repeat, an alternative ('|') or nothing. "
                "Repeat single characters or classes only, as in [a-z.]+, or write two rules"
            )
        repeats += kind in _REPEATS and argument[1] - argument[0] > 1
        ways *= _ways(kind, argument)
    if repeats > MAX_REPEATS or ways > MAX_WAYS:
        raise ValueError(
            f"{pattern!r} may take forever to match: it has {repeats} repeats and {ways} ways through its "
            f"alternatives; {MAX_REPEATS} and {MAX_WAYS} are allowed. Use a glob, or write two rules"
        )


def _steps(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every operation of a parsed expression by name, the inner ones too."""
    if hasattr(tree, "data"):
        for operation, argument in tree.data:
            yield str(operation), argument
            yield from _steps(argument)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _steps(part)


def _is_endless(repeat: Any) -> bool:
    """Whether what happens more than once can match in several ways, or match nothing and go on."""
    _, most, body = repeat
    return most > 1 and (body.getwidth()[0] == 0 or any(_varies(*step) for step in _steps(body)))


def _varies(kind: str, argument: Any) -> bool:
    """Whether an operation can match in more than one way: an alternative, or a repeat of no fixed count."""
    return kind in {"BRANCH", "GROUPREF_EXISTS"} or (kind in _REPEATS and argument[0] != argument[1])


def _ways(kind: str, argument: Any) -> int:
    if kind == "BRANCH":
        return len(argument[1])
    return 2 if _varies(kind, argument) and (kind == "GROUPREF_EXISTS" or argument[1] - argument[0] == 1) else 1
