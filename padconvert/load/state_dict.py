"""State dicts and the checkpoints that hold one: which entry is taken, and under which names."""

from __future__ import annotations

from dataclasses import dataclass

from padconvert.allow import hint
from padconvert.errors import FileError, UnsafeError
from padconvert.load.nodes import ObjectNode, RefusedNode, SeriesNode, TableNode, TensorNode, Value

# Where training scripts put the network, in the order in which they are looked for.
KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params", "ema",
    "model_ema", "state_dict_ema", "ema_state_dict", "backbone", "encoder",
)  # fmt: skip
_OPTIMIZER = {"param_groups", "state"}
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Found:
    """The part of a pickle that holds the network: a module, or a table of tensors; and how it was reached."""

    node: ObjectNode | TableNode
    kind: str
    notes: tuple[str, ...]


def find_network(root: Value, where: str) -> Found:
    """The network in a pickle's tree. Raises FileError, with the next step, where there is none or several."""
    match root:
        case ObjectNode():
            return Found(root, "module", ())
        case TableNode() if _is_state_dict(root):
            return Found(root, "state_dict", ())
        case TableNode():
            return _inside(root, where, "", _DEPTH)
        case RefusedNode(name=name, why=why):
            raise UnsafeError(f"{where}: {name.full}: {why}; {hint(name.module, name.name)}.")
        case TensorNode():
            raise FileError(f"{where}: a single tensor, not a model. Save the model or its state dict.")
        case _:
            what = type(root).__name__ if not isinstance(root, SeriesNode) else root.kind.value
            raise FileError(f"{where}: a saved {what}, not a model. Save the model or its state dict.")


def _inside(table: TableNode, where: str, path: str, depth: int) -> Found:
    entries = {key: value for key, value in table.pairs if isinstance(key, str)}
    if _is_optimizer(table):
        raise FileError(f"{where}: an optimizer's state, not a model's. Name the file that holds the model.")
    holders = {key: value for key, value in entries.items() if _holds_network(value, depth)}
    named = [key for key in KEYS if key in holders]
    if not named and len(holders) != 1:
        keys = ", ".join(repr(key) for key in list(entries)[:8]) or "nothing"
        which = "more than one could be the network" if holders else "none of them holds a network"
        raise FileError(f"{where}: a dict with {keys}; {which}. Save the state dict alone and name that file.")
    key = named[0] if named else next(iter(holders))
    value = holders[key]
    notes = [f"took {path}{key!r}"]
    left = [repr(other) for other in entries if other != key]
    if left:
        notes[0] += f"; left unread: {', '.join(left)}"
    if isinstance(value, TableNode) and not _is_state_dict(value):
        deeper = _inside(value, where, f"{path}{key!r} → ", depth - 1)
        return Found(deeper.node, "checkpoint", (*notes[:-1], *deeper.notes))
    assert isinstance(value, TableNode | ObjectNode)
    return Found(value, "checkpoint", tuple(notes))


def _holds_network(value: Value, depth: int) -> bool:
    if isinstance(value, ObjectNode):
        return value.state is not None and any(key == "_modules" for key, _ in value.state.pairs)
    if not isinstance(value, TableNode) or _is_optimizer(value):
        return False
    if _is_state_dict(value):
        return True
    return depth > 1 and any(key in KEYS and _holds_network(inner, depth - 1) for key, inner in value.pairs)


def _is_optimizer(table: TableNode) -> bool:
    return {key for key, _ in table.pairs if isinstance(key, str)} >= _OPTIMIZER


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
