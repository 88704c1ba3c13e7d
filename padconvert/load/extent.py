"""How much a tree is when it is spelled out. A few bytes that refer to one another may stand for more than any memory
holds, and much of what looks at an object (a copy, a message, a list of a network's layers) spells it out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from padconvert.errors import FileError
from padconvert.load.nodes import Node, ObjectNode, children

_DEEPEST_DATA = 100
_DEEPEST = 250
_MOST_VALUES = 4_000_000
_MOST_NAMES = 100_000


def check_extent(nodes: Iterable[Node], where: str) -> None:
    """Raises FileError where plain data, as attributes of objects or by itself, is nested too deeply or is too much
    once every shared part is counted wherever it stands. `nodes` are in the order of `nodes.walk`."""
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    total = 0
    for node in nodes:
        inner = list(children(node))
        size = len(inner) + sum(sizes.get(id(child), 0) for child in inner)
        depth = 1 + max((depths.get(id(child), 0) for child in inner), default=0)
        if isinstance(node, ObjectNode):  # to what holds it, it is one value
            total += size
        else:
            sizes[id(node)], depths[id(node)] = size, depth
        if depth > _DEEPEST_DATA or max(total, size) > _MOST_VALUES:
            raise FileError(
                f"{where}: lists or dicts among its attributes are nested over {_DEEPEST_DATA} deep, or hold one "
                f"another over and over (more than {_MOST_VALUES} values in all). Save its state dict, and name a "
                "factory with --arch."
            )


def check_names(root: nn.Module, where: str) -> None:
    """Raises FileError where modules contain themselves, are nested too deeply, or have more names than any network:
    torch walks a module by recursion, and a layer has all of its names."""
    _extent_of(root, {}, [], where)


def _extent_of(
    module: nn.Module, known: dict[int, tuple[int, int]], above: list[nn.Module], where: str
) -> tuple[int, int]:
    """(how many modules there are from this one on, each as often as it has a name; how deep they are nested)."""
    if any(module is other for other in above):
        raise FileError(f"{where}: its modules contain themselves. The file is damaged.")
    if id(module) not in known and len(above) <= _DEEPEST:
        count, height = 1, 0
        for child in module._modules.values():
            if child is not None:
                of_child = _extent_of(child, known, [*above, module], where)
                count, height = count + of_child[0], max(height, of_child[1] + 1)
        known[id(module)] = count, height
    count, height = known.get(id(module), (1, 0))
    if len(above) + height > _DEEPEST or count > _MOST_NAMES:
        raise FileError(
            f"{where}: its modules are nested over {_DEEPEST} deep, or hold one another over and over (more than "
            f"{_MOST_NAMES} names). No network does; the file is damaged."
        )
    return count, height
