"""The walk itself: layers found, judged, watched, given roles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from padconvert.walk.causal import find_causal
from padconvert.walk.experts import find_experts, find_mixtures
from padconvert.walk.forward import Watched, watch
from padconvert.walk.found import Found, find_layers
from padconvert.walk.groups import Groups, find_groups
from padconvert.walk.info import LayerInfo, Walk
from padconvert.walk.probe import error_line, trials, why_refused
from padconvert.walk.quiet import is_uninitialized
from padconvert.walk.roles import find_roles
from padconvert.walk.spec import ProbeSpec
from padconvert.walk.ties import find_ties
from padconvert.walk.verdict import find_readers, judge
from padconvert.words import Reason, Role


def walk_tree(root: nn.Module, probe: ProbeSpec | None, samples: int) -> Walk:
    """See `padconvert.walk.walk`."""
    layers = find_layers(root)
    watched, notes = _try_to_watch(root, layers, probe, samples)
    return _walked(root, layers, probe, watched, notes)


def walk_by_trying(root: nn.Module, input_shape: tuple[int, ...] | None, samples: int) -> Walk:
    """See `padconvert.walk.walk_trying`."""
    layers, first = find_layers(root), None
    for probe in trials(root, input_shape):
        first = first or probe
        watched, notes = _try_to_watch(root, layers, probe, samples)
        if watched is not None and watched.outputs:
            return _walked(root, layers, probe, watched, notes)
    return walk_tree(root, None if input_shape is None else first, samples)


def _walked(
    root: nn.Module, layers: Sequence[Found], probe: ProbeSpec | None, watched: Watched | None, notes: tuple[str, ...]
) -> Walk:
    """What is to be said of the layers, `watched` in a forward on the probe or not."""
    judged = _judge_all(root, layers, watched)
    roles = find_roles(root, layers, watched)
    groups = find_groups(layers, watched, roles, [reason for reason, _ in judged])
    causal = _causal(root, layers, probe, watched)
    infos = tuple(
        dataclasses.replace(
            _info(layer, index, judged[index], roles[index], watched),
            causal=causal.get(index),
            **_in_group(index, groups, judged[index]),
        )
        for index, layer in enumerate(layers)
    )
    mixtures = find_mixtures(root)
    said = (*notes, *_on_mixtures(mixtures))
    if watched is None:
        return Walk(infos, "tree", said, mixtures)
    return Walk(infos, "forward", said, mixtures, probe, watched.outputs)


def _causal(
    root: nn.Module, layers: Sequence[Found], probe: ProbeSpec | None, watched: Watched | None
) -> dict[int, bool]:
    if watched is None or probe is None:
        return {}
    return find_causal(root, layers, probe, watched.sequences, watched.samples)


def _on_mixtures(mixtures: Sequence[str]) -> tuple[str, ...]:
    if not mixtures:
        return ()
    more = f" and {len(mixtures) - 1} more" if len(mixtures) > 1 else ""
    return (f"already a mixture of experts, and left as it is: {mixtures[0]}{more}",)


def _judge_all(root: nn.Module, layers: Sequence[Found], watched: Watched | None) -> list[tuple[Reason, str]]:
    ties, readers, experts = find_ties(root), find_readers(root), find_experts(root)
    judged = [judge(layer, ties, readers, experts) for layer in layers]
    if watched is None:
        return judged
    return [
        _judge_by_forward(layers[index], index, watched) if each[0] is Reason.ELIGIBLE else each
        for index, each in enumerate(judged)
    ]


def _in_group(index: int, groups: Groups, judged: tuple[Reason, str]) -> dict[str, Any]:
    """What a feed-forward block changes of a layer's info."""
    if index in groups.members:
        group, place = groups.members[index]
        return {"role": Role.FFN, "group": group, "place": place}
    return {"detail": groups.words[index]} if judged[0] is Reason.ELIGIBLE and index in groups.words else {}


def _try_to_watch(
    root: nn.Module, layers: Sequence[Found], probe: ProbeSpec | None, samples: int
) -> tuple[Watched | None, tuple[str, ...]]:
    """A watched forward, or the note that says why there is none."""
    if probe is None:
        unknown = "no input is known, so shapes, multiply-adds and call order are not either"
        refused = why_refused(root)
        return None, (unknown,) if refused is None else (unknown, refused)
    if is_uninitialized(root):
        return None, ("no forward was made: it would give the lazy layers their weights",)
    try:
        return watch(root, layers, probe, samples), (f"inputs: {probe.origin}",)
    except Exception as error:  # the model's own code may raise anything; a walk never does
        return None, (f"a forward on {probe.origin} fails: {error_line(error)}",)


def _info(layer: Found, index: int, judged: tuple[Reason, str], role: Role, watched: Watched | None) -> LayerInfo:
    seen = watched.seen.get(index) if watched is not None else None
    reason, detail = judged
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
        by_sample=seen.by_sample if seen else None,
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
