"""The walk itself: layers found, judged, watched, given roles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from padconvert.walk.forward import Watched, watch
from padconvert.walk.found import Found, find_layers
from padconvert.walk.info import LayerInfo, Walk
from padconvert.walk.quiet import is_uninitialized
from padconvert.walk.roles import find_roles
from padconvert.walk.spec import ProbeSpec
from padconvert.walk.ties import find_ties
from padconvert.walk.verdict import find_readers, judge
from padconvert.words import Reason, Role


def walk_tree(root: nn.Module, probe: ProbeSpec | None) -> Walk:
    """See `padconvert.walk.walk`."""
    layers = find_layers(root)
    ties, readers = find_ties(root), find_readers(root)
    watched, notes = _try_to_watch(root, layers, probe)
    roles = find_roles(root, layers, watched)
    infos = tuple(
        _info(layer, index, judge(layer, ties, readers), roles[index], watched) for index, layer in enumerate(layers)
    )
    return Walk(infos, "tree" if watched is None else "forward", (*notes, *_unlisted(root)))


def _unlisted(root: nn.Module) -> tuple[str, ...]:
    """A note on transformers' `Conv1D`: a linear layer in all but class, which nobody should miss silently."""
    count = sum(type(child).__name__ == "Conv1D" and hasattr(child, "nf") for child in root.modules())
    return (f"{count} of transformers' Conv1D layers are not converted: they are not nn.Linear",) if count else ()


def _try_to_watch(
    root: nn.Module, layers: Sequence[Found], probe: ProbeSpec | None
) -> tuple[Watched | None, tuple[str, ...]]:
    """A watched forward, or the note that says why there is none."""
    if probe is None:
        return None, ("no input is known, so shapes, multiply-adds and call order are not either",)
    if is_uninitialized(root):
        return None, ("no forward was made: it would give the lazy layers their weights",)
    try:
        return watch(root, layers, probe), (f"inputs: {probe.origin}",)
    except Exception as error:  # the model's own code may raise anything; a walk never does
        line = next(iter(str(error).splitlines()), "") or "no message"
        return None, (f"a forward on {probe.origin} fails: {type(error).__name__}: {line}",)


def _info(layer: Found, index: int, judged: tuple[Reason, str], role: Role, watched: Watched | None) -> LayerInfo:
    seen = watched.seen.get(index) if watched is not None else None
    reason, detail = judged
    if reason is Reason.ELIGIBLE and watched is not None:
        reason, detail = _judge_by_forward(layer, index, watched)
    return LayerInfo(
        name=layer.name,
        aliases=layer.names[1:],
        type=type(layer.module).__name__,
        kind=layer.kind,
        role=role,
        eligible=reason is Reason.ELIGIBLE,
        reason=reason,
        weight_shape=layer.weight_shape,
        has_bias=_has_bias(layer.module),
        groups=layer.groups,
        dtype=_dtype(layer.module),
        macs=watched.macs(index, math.prod(layer.weight_shape)) if watched is not None and seen else None,
        calls=None if watched is None else seen.calls if seen else 0,
        order=seen.order if seen else None,
        input_shape=seen.input_shape if seen else None,
        output_shape=seen.output_shape if seen else None,
        detail=detail,
    )


def _judge_by_forward(layer: Found, index: int, watched: Watched) -> tuple[Reason, str]:
    """What only a forward shows."""
    if index in watched.read:
        parent = layer.name.rpartition(".")[0] or "the model itself"
        return Reason.WEIGHT_READ_BY_PARENT, f"something outside the layer computes with its weight, likely {parent}"
    if index not in watched.seen:
        return Reason.NOT_CALLED, ""
    return Reason.ELIGIBLE, ""


def _has_bias(module: nn.Module) -> bool:
    stated = getattr(module, "has_bias", None)  # a Pad layer
    if stated is not None:
        return bool(stated)
    computed = module._modules.get("parametrizations")
    return module._parameters.get("bias") is not None or (computed is not None and "bias" in computed._modules)


def _dtype(module: nn.Module) -> str:
    """Of the layer's first parameter, which for a parametrised layer is what its weight is computed from."""
    parameter = next(module.parameters(), None)
    return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")
