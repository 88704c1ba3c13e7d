"""Which layers share a weight or bias with another module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Span = tuple[int, int, int]  # storage, first byte, end


@dataclass(frozen=True, slots=True)
class Owned:
    """One tensor of one module, and the bytes it covers."""

    module: nn.Module
    name: str  # dotted, with the tensor's own name
    span: Span


def find_ties(root: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """For every module that shares memory with another: the dotted names of the other modules' tensors.

    Two tensors share when their byte ranges in one storage overlap, so the flat buffer of a distributed
    wrapper, which holds all parameters side by side, ties nothing.
    """
    owned = [
        Owned(module, f"{prefix}.{name}".lstrip("."), span)
        for prefix, module in root.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if (span := span_of(tensor)) is not None
    ]
    ties: dict[nn.Module, list[str]] = {}
    for group in _overlapping(owned):
        for one in group:
            others = [other.name for other in group if other.module is not one.module]
            if others:
                ties.setdefault(one.module, []).extend(others)
    return {module: tuple(dict.fromkeys(names)) for module, names in ties.items()}


def span_of(tensor: Tensor | None) -> Span | None:
    """The storage and byte range a tensor covers; None for one without memory of its own."""
    if tensor is None or is_lazy(tensor) or tensor.numel() == 0:
        return None
    try:
        storage = int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have no storage
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return storage, start, start + extent * tensor.element_size()


def _overlapping(owned: list[Owned]) -> list[list[Owned]]:
    """Runs of tensors whose byte ranges overlap, in the module's order."""
    runs: list[list[Owned]] = []
    end: tuple[int, int] = (-1, -1)
    for one in sorted(owned, key=lambda one: one.span):
        storage, start, stop = one.span
        if storage == end[0] and start < end[1]:
            runs[-1].append(one)
            end = (storage, max(end[1], stop))
        else:
            runs.append([one])
            end = (storage, stop)
    place = {id(one): i for i, one in enumerate(owned)}
    return [sorted(run, key=lambda one: place[id(one)]) for run in runs if len(run) > 1]
