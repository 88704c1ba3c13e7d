"""Which modules are a mixture of experts already, with its experts and its router."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

EXPERTS_CLASS = re.compile(r"Experts")
# Not `Moe` alone: every class of such a model is called so (Qwen2MoeAttention).
BLOCK_CLASS = re.compile(r"MoE|SparseMoe")
_WORDS = "part of the mixture "
ROUTER = re.compile(r"gate|router|gating", re.IGNORECASE)


def find_experts(root: nn.Module) -> dict[nn.Module, str]:
    """Every module within a mixture of experts below `root`, with words that name the mixture."""
    inside: dict[nn.Module, str] = {}
    for name, parent in root.named_modules():
        for part in _parts(parent, is_root=parent is root):
            words = f"{_WORDS}{name or 'the model itself'} ({type(parent).__name__})"
            for module in part.modules():
                inside.setdefault(module, words)
    return inside


def find_mixtures(root: nn.Module) -> tuple[str, ...]:
    """The outermost mixtures of experts below `root`: name and class."""
    found = dict.fromkeys(words.removeprefix(_WORDS) for words in find_experts(root).values())
    return tuple(found)


def _parts(parent: nn.Module, *, is_root: bool) -> Iterator[nn.Module]:
    """The module itself where it is a mixture as a whole, else its experts and the routers beside them."""
    kind = type(parent).__name__
    experts = [child for name, child in parent.named_children() if _are_experts(name, child, parent)]
    routers = [child for name, child in parent.named_children() if ROUTER.search(name)]
    if not is_root and BLOCK_CLASS.search(kind) and (experts or routers):
        yield parent
    elif experts:
        yield from (*experts, *routers)
    elif not is_root and EXPERTS_CLASS.search(kind):
        yield parent


def _are_experts(name: str, child: nn.Module, parent: nn.Module) -> bool:
    """By its class, or a container of blocks of one class, named experts, with a router beside it."""
    if EXPERTS_CLASS.search(type(child).__name__):
        return True
    if name != "experts" or not isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    kinds = {type(block) for block in child.children()}
    beside = [other for other in (*parent._modules, *parent._parameters) if ROUTER.search(other)]
    return len(child) > 1 and len(kinds) == 1 and bool(beside)
