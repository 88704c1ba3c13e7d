"""What an exported program was called with: inputs for a probe, so that nobody has to guess."""

from __future__ import annotations

from typing import Any

from padconvert.load.exported_grammar import LEAF
from padconvert.load.exported_program import TENSORS, Json
from padconvert.walk.spec import InputSpec

#: ids 0 and 1 exist in every vocabulary
_UNKNOWN_VOCABULARY = 2
_EMBEDDING = "aten.embedding.default"
_KEEPING = ("view", "reshape", "to", "contiguous", "clone", "unsqueeze", "squeeze", "slice", "select")


def known_inputs(document: Json) -> tuple[InputSpec, ...]:
    """The program's own inputs without their batch; empty where a probe cannot express them (nested, or no batch)."""
    _, [[_, positional], [_, named]] = document["call"]["given"]
    trees = [*positional, *(tree for _, tree in named)]
    users = [given for given in document["inputs"] if given["kind"] not in TENSORS]
    if any(tree != LEAF for tree in trees):
        return ()
    words = [None] * len(positional) + [key for key, _ in named]
    # a fixed value is left out, so what comes after it has to be called by name
    fixed = next((i for i, given in enumerate(users) if given["kind"] == "value"), len(users))
    names = document["call"]["names"]
    if fixed < len(users) and len(names) == len(users):
        words = [word if i < fixed else names[i] for i, word in enumerate(words)]
    kept = [(word, given) for word, given in zip(words, users, strict=True) if given["kind"] == "user"]
    if not all(given["shape"] for _, given in kept):
        return ()
    return tuple(_spec(document, word, given) for word, given in kept)


def fixed_batch(document: Json) -> int | None:
    """The batch size that the program was exported for, where it takes no other."""
    users = [given for given in document["inputs"] if given["kind"] == "user" and given["shape"]]
    sizes = {given["shape"][0] for given in users if 0 not in given["dynamic"]}
    return sizes.pop() if users and len(sizes) == 1 and not any(0 in given["dynamic"] for given in users) else None


def _spec(document: Json, word: str | None, given: Json) -> InputSpec:
    whole = given["dtype"].startswith(("int", "uint", "bool"))
    mask = "mask" in (word or given["name"])
    high = (2 if mask else _vocabulary(document, given["name"])) if whole else None
    return InputSpec(word, tuple(given["shape"][1:]), given["dtype"], high, 1 if whole and mask else 0)


def _vocabulary(document: Json, name: str) -> int:
    """The rows of the table that the input looks up, directly or reshaped."""
    stored = [given for given in document["inputs"] if given["kind"] in TENSORS and given["shape"]]
    rows = {given["name"]: given["shape"][0] for given in stored}
    same = {name}
    for node in document["nodes"]:
        args: list[Any] = node["args"]
        if node["op"] == _EMBEDDING and len(args) > 1 and _name(args[1]) in same:
            return int(rows.get(_name(args[0]), _UNKNOWN_VOCABULARY))
        if args and _name(args[0]) in same and isinstance(node["out"], str) and _keeps_values(node["op"]):
            same.add(node["out"])
    return _UNKNOWN_VOCABULARY


def _keeps_values(op: str) -> bool:
    return op.split(".")[1] in _KEEPING


def _name(value: Any) -> str:
    return str(value.get("n", "")) if isinstance(value, dict) else ""
