"""Correct the chooser by the clock, where somebody asks: for inference, on inputs like those to come.

`tune_(call, model)` lets every convolution measure which path is its fastest *in use*: the whole model runs once for
each path, in turns, and each layer times itself there, with its input fresh from the layer before and its weights as
cold as they are between two calls. A path that wins on its own, called again and again, may lose there.

What was measured stays with the layers of `model` until `untune_`. Converting never measures: a conversion chooses by
the estimates alone, so that equal runs give equal bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from padconvert.layers.conv import PadConv
from padconvert.layers.paths import chooser
from padconvert.layers.paths.case import case_of

#: each path is timed this often, in turns with the others
TURNS = 5
#: a turn lasts at least so many seconds; models that take less run several times within it
TURN_SECONDS = 0.01
#: paths that are estimated to take more than this many times the best are not timed
FAR_OFF = 3.0
#: nor are those timed again that took more than this many times the best so far
BEHIND = 1.2
#: nearer than this, times differ by chance, and the estimates decide
EQUAL = 1.02


@dataclass(slots=True)
class _Race:
    """The paths of one layer on inputs of one shape, with the seconds that each took, turn by turn."""

    names: list[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def told(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        return median(self.seconds[name]) if name in self.seconds else math.inf

    def within(self, factor: float) -> list[str]:
        """The paths whose time is within `factor` of the shortest, in the order of their estimates."""
        limit = factor * min(map(self.median, self.names))
        return [name for name in self.names if self.median(name) <= limit]


class _Tuner:
    """Hooks of one model: before a layer is called, choose the turn's path for it; after, note how long it took."""

    def __init__(self) -> None:
        self.races: dict[tuple[object, ...], _Race] = {}
        self.layers: dict[str, str] = {}
        self.place, self.warm = 0, False
        self._running: tuple[_Race, str, float] | None = None

    @property
    def most(self) -> int:
        """Paths that are left in the longest race."""
        return max((len(race.names) for race in self.races.values()), default=1)

    def hooks(self, name: str, layer: PadConv) -> Iterator[Any]:
        yield layer.register_forward_pre_hook(lambda _, args: self._before(name, layer, args[0]))
        yield layer.register_forward_hook(lambda *_: self._after(layer))

    def _before(self, name: str, layer: PadConv, x: torch.Tensor) -> None:
        x = x if x.dim() > layer.spatial + 1 else x[None]
        if not layer.is_dynamic or not len(x):
            return
        case = case_of(layer, x)
        if case.gradient or case.compiled:
            self.layers[name] = chooser.choose(layer, x)
            return
        race = self.races.setdefault((name, x.shape), _Race(chooser.promising(case, FAR_OFF)))
        path = race.names[self.place % len(race.names)]
        chooser.keep(layer, x, path)
        self.layers[name] = path
        _wait(layer)
        self._running = (race, path, time.perf_counter())

    def _after(self, layer: PadConv) -> None:
        if self._running is None:
            return
        _wait(layer)
        race, path, start = self._running
        self._running = None
        if self.warm:
            race.told(path, time.perf_counter() - start)


def tune_(call: Callable[[], object], model: nn.Module) -> dict[str, str]:
    """Measure on `call()`, which runs `model` on inputs like those to come, without gradients; it runs some dozens of
    times. Returns the path of every converted convolution that was called, at its last call.

    The model's values stay as they were. What it was given before is forgotten.
    """
    untune_(model)
    tuner = _Tuner()
    hooks = [hook for name, layer in _convolutions(model) for hook in tuner.hooks(name, layer)]
    try:
        with torch.no_grad():
            _race(call, tuner)
            tuner.warm = False
            _run(call, tuner, 0, 1)  # each layer takes its winner, the only one that is left
    finally:
        for hook in hooks:
            hook.remove()
    return tuner.layers


def _race(call: Callable[[], object], tuner: _Tuner) -> None:
    took = _run(call, tuner, 0, 1)
    for place in range(1, tuner.most):  # each path allocates and packs on its first call
        took = min(took, _run(call, tuner, place, 1))
    repeats = max(1, min(1000, math.ceil(TURN_SECONDS / max(took, 1e-9))))
    tuner.warm = True
    for _ in range(TURNS):
        if tuner.most == 1:
            break
        for place in range(tuner.most):
            _run(call, tuner, place, repeats)
        for race in tuner.races.values():
            race.names = race.within(BEHIND)
    for race in tuner.races.values():
        race.names = race.within(EQUAL)[:1]


def _run(call: Callable[[], object], tuner: _Tuner, place: int, repeats: int) -> float:
    tuner.place = place
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def untune_(model: nn.Module) -> None:
    """Forget what was measured for `model`."""
    for _, layer in _convolutions(model):
        chooser.forget(layer)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, PadConv]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PadConv))


def _wait(layer: PadConv) -> None:
    device = layer.weight.device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
