"""A file that torch.save wrote: a whole module, a state dict, or a checkpoint that holds either."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from padconvert.errors import FileError
from padconvert.load.build import build
from padconvert.load.names import check_names
from padconvert.load.nodes import NameNode, ObjectNode, TableNode, TensorNode, View, walk
from padconvert.load.reader import Pickled, read
from padconvert.load.reductions import DTYPE_BYTES
from padconvert.load.state_dict import find_network, tensor_names

Loaded = tuple[str, nn.Module | None, Mapping[str, Tensor], tuple[str, ...]]


def load_pickled(path: Path, trust: tuple[str, ...], key: str | None = None, intact: bool = True) -> Loaded:
    """(kind, the module where the file holds one, its tensors otherwise, notes). `key`: the entry to take it from;
    `intact`: whether the records that are taken are held against their checksums, which reads them once.

    Raises UnsafeError where a name in the file is not allowed, FileError where there is no network in it, UsageError
    where there is none under `key`.
    """
    pickled = _read(path, trust)
    pickled.storages.intact = intact
    check_names(pickled.tree.names, trust, str(path))
    found = find_network(pickled.tree.root, str(path), key)
    if isinstance(found.node, ObjectNode):
        return found.kind, _module(pickled, found.node, trust, path), {}, found.notes
    tensors, notes = _tensors(pickled, found.node, path)
    return found.kind, None, tensors, (*found.notes, *notes)


def _read(path: Path, trust: tuple[str, ...]) -> Pickled:
    """As `read`; of a file that is damaged, or no model, the names that it mentions count first."""
    names: list[NameNode] = []
    try:
        return read(path, names)
    except FileError:
        check_names(names, trust, str(path))
        raise


def network_bytes(path: Path, key: str | None = None) -> int:
    """Bytes of the tensors of the network that `load_pickled` would take, from the pickle alone: none is built.

    Raises as `load_pickled` does, but for names.
    """
    pickled = read(path)
    seen: Counter[str] = Counter()
    for node in walk(find_network(pickled.tree.root, str(path), key).node):
        if isinstance(node, TensorNode) and isinstance(node.source, View):
            seen[node.source.storage] += math.prod(node.source.size) * DTYPE_BYTES[node.source.dtype]
    # tensors that share a storage, or show it expanded, hold it once
    return sum(min(size, pickled.storages.regions[storage].size) for storage, size in seen.items())


def _module(pickled: Pickled, node: ObjectNode, trust: tuple[str, ...], path: Path) -> nn.Module:
    built = build(node, lambda tensor: _tensor(pickled, tensor), trust, str(path))
    if not isinstance(built, nn.Module):
        raise FileError(f"{path}: a saved {type(built).__name__}, not a model. Save the model or its state dict.")
    return built


def _tensors(pickled: Pickled, table: TableNode, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    nodes = {key: value for key, value in table.pairs if isinstance(key, str) and isinstance(value, TensorNode)}
    names, notes = tensor_names(list(nodes), str(path))
    made: dict[int, Tensor] = {}
    for node in nodes.values():
        made[id(node)] = _tensor(pickled, node)
    left = [repr(key) for key, value in table.pairs if not isinstance(value, TensorNode)]
    if left:
        notes += (f"left unread among the tensors: {', '.join(left[:6])}",)
    return {name: made[id(nodes[stored])] for name, stored in names.items()}, notes


def _tensor(pickled: Pickled, node: TensorNode) -> Tensor:
    return pickled.storages.tensor(view_of(pickled, node))


def view_of(pickled: Pickled, node: TensorNode) -> View:
    """Where a tensor's values lie. Raises FileError where the file does not say."""
    if not isinstance(node.source, View):
        raise FileError(f"{pickled.storages.file.path}: a tensor without a storage. The file is damaged.")
    return node.source
