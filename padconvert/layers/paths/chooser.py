"""The chooser: which path a call takes.

`choose` asks, in this order: the environment (`PADCONVERT_PATH` forces one path), what `tune_` measured for this
layer, and the paths' own estimates. Without `tune_` no clock is involved: equal cases are given equal paths.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.errors import UsageError
from padconvert.layers.paths import (
    aggregate,
    buffer,
    buffer_matmul,
    buffer_packed,
    loop,
    matmul,
    mix,
    pieces,
    rows,
    rows_grouped,
    unfold,
)
from padconvert.layers.paths.case import Case, case_of, is_plain
from padconvert.layers.paths.cost import machine_of

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv

#: the paths of a convolution by name; each module has `unable`, `seconds` and `convolve`. Equal estimates: the first.
PATHS: dict[str, ModuleType] = {
    path.__name__.rpartition(".")[2]: path
    for path in (aggregate, buffer, buffer_matmul, buffer_packed, pieces, loop, rows, rows_grouped, matmul, unfold, mix)
}
VARIABLE = "PADCONVERT_PATH"

_log = logging.getLogger(__name__)
_lock = threading.Lock()
#: what was chosen or measured for a layer; a copy of the layer starts anew
_chosen: weakref.WeakKeyDictionary[PadConv, dict[tuple[object, ...], str]] = weakref.WeakKeyDictionary()
#: so many shapes of a layer's inputs are remembered; others are estimated anew
REMEMBERED = 512


def choose(layer: PadConv, x: Tensor) -> str:
    """The name of the path that a call of `layer` on `x` takes, one of `PATHS`.

    Raises UsageError where PADCONVERT_PATH names no path. A forced path that cannot compute this call is replaced by
    the best that can, and the log says why.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return "mix"  # every other path fixes the batch size
    forced = os.environ.get(VARIABLE)
    if forced:
        return _forced(forced, case_of(layer, x))
    if not is_plain(x):
        return best(case_of(layer, x))
    names, key = _chosen.get(layer), _key(layer, x)
    if names is None:
        with _lock:
            names = _chosen.setdefault(layer, {})
    name = names.get(key)
    if name is None:
        name = best(case_of(layer, x))
        if len(names) < REMEMBERED:
            names[key] = name
    return name


def _key(layer: PadConv, x: Tensor) -> tuple[object, ...]:
    """What tells the cases of one layer apart: a shorter `Case`, made for every call."""
    parameters, device = layer._parameters, x.device.type
    weight, bias = parameters["weight_dynamic"], parameters["bias_dynamic"]
    return (
        x.shape, x.dtype, device, torch.is_grad_enabled(),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        None if weight is None else weight.shape, None if bias is None else bias.shape,
        layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip


def able(case: Case) -> dict[str, str]:
    """Every path, with why it cannot compute the case; empty where it can."""
    return {name: path.unable(case) for name, path in PATHS.items()}


@functools.lru_cache(maxsize=4096)
def estimated(case: Case) -> dict[str, float]:
    """The paths that can compute the case and their estimated seconds, the fastest first."""
    machine = machine_of(case.device)
    seconds = {name: PATHS[name].seconds(case, machine) for name, why in able(case).items() if not why}
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def best(case: Case) -> str:
    """The path with the smallest estimate."""
    return next(iter(estimated(case)))


def promising(case: Case, factor: float) -> list[str]:
    """The paths within `factor` of the smallest estimate, the fastest first."""
    seconds = estimated(case)
    return [name for name, estimate in seconds.items() if estimate <= factor * seconds[best(case)]]


def keep(layer: PadConv, x: Tensor, name: str) -> None:
    """From now on calls of `layer` on inputs like `x` take the path `name`."""
    with _lock:
        _chosen.setdefault(layer, {})[_key(layer, x)] = name


def forget(layer: PadConv) -> None:
    """Go back to the estimates."""
    with _lock:
        _chosen.pop(layer, None)


def _forced(name: str, case: Case) -> str:
    if name not in PATHS:
        raise UsageError(f"{VARIABLE}={name}: there is no such path. The paths are {', '.join(PATHS)}.")
    why = PATHS[name].unable(case)
    if not why:
        return name
    _say_once(name, best(case), why)
    return best(case)


@functools.lru_cache(maxsize=256)
def _say_once(name: str, instead: str, why: str) -> None:
    _log.warning("%s=%s cannot compute a layer (%s); %s is used there", VARIABLE, name, why, instead)
