"""Calling a module without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer lives; the CPU for a module without any."""
    tensors = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def is_uninitialized(module: nn.Module) -> bool:
    """Whether a lazy layer waits for its first input: a call would give it its weights."""
    tensors = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return any(is_lazy(tensor) for tensor in tensors)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients, no warnings. Afterwards: attributes, buffers and random state as before.

    The mode is set by attribute, since a `train` of the module's own may do more than that (merge weights).
    Parameters are not copied: a forward that writes into them under `no_grad` would show.
    """
    states = [_State(child) for child in module.modules()]
    numbers = (random.getstate(), np.random.get_state())
    devices = {tensor.device.index or 0 for tensor in module.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for state in states:
                state.module.training = False
            yield
        finally:
            for state in states:
                state.restore()
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside: eval mode, with gradients as they are. Afterwards every child's mode is as it was."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


class _State:
    """What one module looked like: its attributes, and what the containers among them held.

    Among the containers are its tensors, children and hooks: some transformers models hang hooks on themselves
    in their first forward, and would do so twice if only the attribute that says so came back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes: dict[str, Any] = dict(module.__dict__)
        held = list(self.attributes.values())
        self.tables = [(value, value.copy()) for value in held if type(value) in (dict, OrderedDict)]
        self.lists = [(value, value.copy()) for value in held if type(value) is list]
        self.buffers: list[tuple[Tensor, int, Tensor]] = [
            (buffer, buffer._version, buffer.clone()) for buffer in module._buffers.values() if buffer is not None
        ]

    def restore(self) -> None:
        for table, items in [*self.tables, (self.module.__dict__, self.attributes)]:
            table.clear()
            table.update(items)
        for values, items in self.lists:
            values[:] = items
        for buffer, version, value in self.buffers:
            if buffer._version != version:
                buffer.copy_(value)
