"""State dicts and the checkpoints that hold one: which entry is taken, and under which names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from padconvert.allow import WRAPPERS, hint, unread
from padconvert.errors import FileError, UnsafeError, UsageError
from padconvert.load.nodes import (
    MemberNode,
    NameNode,
    ObjectNode,
    PlainNode,
    RefusedNode,
    SeriesNode,
    StorageNode,
    TableNode,
    TensorNode,
    Value,
)

# Where training scripts put the network, in the order in which they are looked for.
KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params", "ema",
    "model_ema", "state_dict_ema", "ema_state_dict", "backbone", "encoder",
)  # fmt: skip
_OPTIMIZER = {"param_groups", "state"}
_MODEL = "Save the model's state dict, torch.save(model.state_dict(), path), and name that file"
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Found:
    """The part of a pickle that holds the network: a module, or a table of tensors; and how it was reached."""

    node: ObjectNode | TableNode
    kind: str
    notes: tuple[str, ...]


def find_network(root: Value, where: str, key: str | None = None) -> Found:
    """The network in a pickle's tree; `key` names the entry of the outermost dict to take it from.

    Raises FileError, with the next step, where there is none or several, UsageError for a key that is not there.
    """
    if key is not None:
        return _unwrapped(_under(root, where, key))
    match root:
        case ObjectNode() if not _has_modules(root) and unread(root.cls.module):
            raise FileError(f"{where}: {_what(root)}.")
        case ObjectNode():
            return _unwrapped(Found(root, "module", ()))
        case TableNode() if _is_state_dict(root):
            return Found(root, "state_dict", ())
        case TableNode():
            return _unwrapped(_inside(root, where, "", _DEPTH))
        case RefusedNode(name=name, why=why):
            raise UnsafeError(f"{where}: {name.full}: {why}; {hint(name.module, name.name)}.")
        case _:
            raise FileError(f"{where}: {_what(root)}.")


def _what(root: Value) -> str:
    """What was saved in place of a model, and what to save instead."""
    match root:
        case ObjectNode() if _is_optimizer(root):
            return f"a saved optimizer ({root.cls.name}), not a model. {_MODEL}"
        case SeriesNode() if _are_optimizers(root):
            return f"a saved {root.kind.value} of optimizers, not a model. {_MODEL}"
        case ObjectNode():
            return f"a saved {root.cls.name}, not a model. {_MODEL}"
        case TensorNode():
            return "a single tensor, not a model. Save the model or its state dict"
        case SeriesNode(items=items) if sum(isinstance(item, ObjectNode) for item in items) > 1:
            return f"a saved {root.kind.value} of {len(items)} objects, not one model. Save each model to its own file"
        case SeriesNode():
            return f"a saved {root.kind.value}, not a model. Save the model in it, or its state dict, by itself"
        case PlainNode():
            return f"a saved {root.kind.value}, not a model. Save the model or its state dict"
        case NameNode():
            return f"the class or function {root.full} by itself, not a model. Save the model or its state dict"
        case MemberNode():
            return f"the result of {root.cls.full}, not a model. Save the model or its state dict"
        case StorageNode():
            return "a single storage, not a model. Save the model or its state dict"
        case _:
            return f"a saved {type(root).__name__}, not a model. Save the model or its state dict"


def _unwrapped(found: Found) -> Found:
    """The network inside a wrapper that only says on which devices to run it."""
    node = found.node
    if not isinstance(node, ObjectNode) or node.cls.full not in WRAPPERS or node.state is None:
        return found
    modules = next((value for key, value in node.state.pairs if key == "_modules"), None)
    inner = [value for key, value in modules.pairs if key == "module"] if isinstance(modules, TableNode) else []
    if len(inner) != 1 or not isinstance(inner[0], ObjectNode):
        return found
    return Found(inner[0], found.kind, (*found.notes, f"took the network inside {node.cls.name}"))


def _under(root: Value, where: str, key: str) -> Found:
    """What `--state-key` names."""
    entries = _entries(root) if isinstance(root, TableNode) else {}
    holders = {name: value for name, value in entries.items() if _holds_network(value, _DEPTH)}
    if key not in holders:
        there = (
            f"Networks are under {_quoted(holders)}" if holders else "There is no network under any key; leave it away"
        )
        raise UsageError(f"--state-key {key}: {where} holds no network under that name. {there}.")
    return _taken(key, entries, where, "", _DEPTH)


def _entries(table: TableNode) -> dict[str, Value]:
    return {key: value for key, value in table.pairs if isinstance(key, str)}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _inside(table: TableNode, where: str, path: str, depth: int) -> Found:
    entries = _entries(table)
    states = [key for key, value in entries.items() if _is_optimizer(value) or _are_optimizers(value)]
    if _is_optimizer(table):
        raise FileError(f"{where}: an optimizer's state, not a model's. Name the file that holds the model.")
    holders = {key: value for key, value in entries.items() if _holds_network(value, depth)}
    named = [key for key in KEYS if key in holders]
    if not holders and states:
        raise FileError(f"{where}: holds an optimizer's state ({states[0]!r}) and no model. {_MODEL}.")
    if not named and len(holders) != 1:
        keys = _quoted(list(entries)[:8]) or "nothing"
        which = "more than one could be the network" if holders else "none of them holds a network"
        step = "Name one with --state-key" if holders and not path else "Save the state dict alone and name that file"
        raise FileError(f"{where}: a dict with {keys}; {which}. {step}.")
    key = named[0] if named else next(iter(holders))
    found = _taken(key, entries, where, path, depth)
    others = [other for other in holders if other != key]
    if others and not path:
        note = f"more networks are in the file; --state-key {others[0]} takes {others[0]!r} instead"
        return Found(found.node, found.kind, (*found.notes, note))
    return found


def _taken(key: str, entries: dict[str, Value], where: str, path: str, depth: int) -> Found:
    value = entries[key]
    notes = [f"took {path}{key!r}"]
    left = _quoted(other for other in entries if other != key)
    if left:
        notes[0] += f"; left unread: {left}"
    if isinstance(value, TableNode) and not _is_state_dict(value):
        deeper = _inside(value, where, f"{path}{key!r} → ", depth - 1)
        return Found(deeper.node, "checkpoint", (*notes[:-1], *deeper.notes))
    assert isinstance(value, TableNode | ObjectNode)
    return Found(value, "checkpoint", tuple(notes))


def _holds_network(value: Value, depth: int) -> bool:
    if isinstance(value, ObjectNode):
        return _has_modules(value)
    if not isinstance(value, TableNode) or _is_optimizer(value):
        return False
    if _is_state_dict(value):
        return True
    return depth > 1 and any(key in KEYS and _holds_network(inner, depth - 1) for key, inner in value.pairs)


def _has_modules(value: Value) -> bool:
    """Whether it is an object with the inside of an nn.Module."""
    state = value.state if isinstance(value, ObjectNode) else None
    return state is not None and any(key == "_modules" for key, _ in state.pairs)


def _is_optimizer(value: Value) -> bool:
    """The state of an optimizer, or the optimizer itself, which pickles with the same keys."""
    table = value.state if isinstance(value, ObjectNode) else value
    return isinstance(table, TableNode) and {key for key, _ in table.pairs if isinstance(key, str)} >= _OPTIMIZER


def _are_optimizers(value: Value) -> bool:
    """As Lightning keeps them, in a list."""
    return isinstance(value, SeriesNode) and bool(value.items) and all(_is_optimizer(item) for item in value.items)


def _is_state_dict(table: TableNode) -> bool:
    """A table from names to tensors; what is not a tensor in it (an `_extra_state`, a counter) is no table of them."""
    tensors = [key for key, value in table.pairs if isinstance(value, TensorNode) and isinstance(key, str)]
    tables = [key for key, value in table.pairs if isinstance(value, TableNode | ObjectNode)]
    named = [key for key in tables if not str(key).endswith("_extra_state")]
    return bool(tensors) and (not named or any("." in str(key) for key in tensors))


def tensor_names(names: list[str], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each tensor's name in the network → its name in the file, wrappers' prefixes stripped, with notes on that.

    Raises FileError where two names become one.
    """
    kept = [name for name in names if name != "n_averaged"]
    inner = {name: name for name in kept}
    notes: list[str] = []
    while inner and all(name.startswith("module.") for name in inner.values()):
        inner = {old: name.removeprefix("module.") for old, name in inner.items()}
        notes.append("stripped the prefix 'module.'")
    if any("_orig_mod" in name.split(".") for name in inner.values()):
        inner = {old: ".".join(p for p in name.split(".") if p != "_orig_mod") for old, name in inner.items()}
        notes.append("stripped '_orig_mod.'")
        if all(name.startswith("module.") for name in inner.values()):
            inner = {old: name.removeprefix("module.") for old, name in inner.items()}
            notes.append("stripped the prefix 'module.'")
    if len(set(inner.values())) != len(inner):
        raise FileError(f"{where}: two tensors have the same name once wrappers' prefixes are stripped.")
    return {new: old for old, new in inner.items()}, tuple(dict.fromkeys(notes))
