"""Correct the chooser by the clock, where somebody asks: for inference, on inputs like those to come.

    with tuned(model):                every call of a convolution within takes the path that is fastest for its shapes
        model(example)

What was measured stays with the layers of `model` until `untune_`. Converting never measures: a conversion chooses by
the estimates alone, so that equal runs give equal bytes.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.layers.conv import PadConv
from padconvert.layers.paths import chooser
from padconvert.layers.paths.case import Case, case_of

#: a path is timed this often, in turns with the others
ROUNDS = 5
#: paths that are estimated to take more than this many times the best are not timed
FAR_OFF = 3.0


def tune_(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Run `model(*args, **kwargs)` once under `tuned`; returns the path of every converted convolution that was called.

    The model is left in the mode it was in, with its values untouched.
    """
    with tuned(model) as found, torch.inference_mode():
        model(*args, **kwargs)
    return found


def untune_(model: nn.Module) -> None:
    """Forget what was measured for `model`."""
    for _, layer in _convolutions(model):
        chooser.forget(layer)


@contextmanager
def tuned(model: nn.Module) -> Iterator[dict[str, str]]:
    """Within, a call of a convolution of `model` without gradients is timed on every promising path first, once a
    shape. Yields layer name → path, filled as calls come."""
    found: dict[str, str] = {}
    hooks = [layer.register_forward_pre_hook(_timing(name, found)) for name, layer in _convolutions(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _convolutions(model: nn.Module) -> Iterator[tuple[str, PadConv]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PadConv))


def _timing(name: str, found: dict[str, str]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def before(layer: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(layer, PadConv)
        x = args[0] if args[0].dim() > layer.spatial + 1 else args[0][None]
        if not layer.is_dynamic or not len(x):
            return
        case = case_of(layer, x)
        if not case.gradient and not case.compiled:
            chooser.keep(layer, x, fastest(layer, x, case))
        found[name] = chooser.choose(layer, x)

    return before


def fastest(layer: PadConv, x: Tensor, case: Case) -> str:
    """The path with the smallest median time on `x`; of equal ones the first by estimate."""
    names = chooser.promising(case, FAR_OFF)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        for name in names:
            took = _seconds(functools.partial(chooser.PATHS[name].convolve, layer, x), x.device)
            if turn:  # the first warms up
                seconds[name].append(took)
    return min(names, key=lambda name: statistics.median(seconds[name]))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
