"""Each converted layer's time over its static one's, inside the running networks; and which path each takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from padconvert.contenders import FULL, OUTPUT, STATIC, Call
from padconvert.layers.pad import PadLayer
from padconvert.layers.paths.measure import tune_
from padconvert.paired import Effort, Paired, Spread
from padconvert.progress import Progress
from padconvert.results import BenchLayer
from padconvert.rewrite import pad_layers
from padconvert.walk.probe import call


def layer_times(
    networks: Mapping[str, nn.Module],
    given: Call,
    size: int,
    paths: Mapping[str, str],
    effort: Effort,
    device: torch.device,
    progress: Progress,
) -> list[BenchLayer]:
    """Every converted layer at its place in the running network, where its input and the caches are what they are."""
    names = list(pad_layers(networks[OUTPUT]))
    times: dict[str, dict[str, list[float]]] = {name: {which: [] for which in networks} for name in names}
    rounds = max(effort.least, effort.rounds // 3)
    for number in range(rounds):
        for which, network in networks.items():
            for name, seconds in _layer_times(network, names, given, device).items():
                times[name][which].append(seconds)
        progress.step(number + 1, rounds)
    output = pad_layers(networks[OUTPUT])
    # a layer that the network does not call with these inputs has no time
    return [
        _layer(name, output[name], size, each, paths.get(name)) for name, each in times.items() if all(each.values())
    ]


def tuned_paths(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Let every converted convolution measure which path is its fastest on these inputs, to be taken from now on.
    Returns the paths by layer. Without gradients only; a training step goes by the estimates."""
    return tune_(lambda: call(network, args, kwargs), network)


def _layer_times(network: nn.Module, names: Sequence[str], given: Call, device: torch.device) -> dict[str, float]:
    """Seconds inside each named submodule during one call of the network, all of its calls together."""
    started: dict[str, float] = {}
    taken: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    def watch(name: str, layer: nn.Module) -> list[Any]:
        def enter(*_: object) -> None:
            started[name] = now()

        def leave(*_: object) -> None:
            taken[name] = taken.get(name, 0.0) + now() - started[name]

        return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]

    hooks = [hook for name in names for hook in watch(name, network.get_submodule(name))]
    try:
        call(network, *given)
    finally:
        for hook in hooks:
            hook.remove()
    return taken


def _layer(name: str, layer: PadLayer, size: int, times: Mapping[str, Sequence[float]], path: str | None) -> BenchLayer:
    found = Paired({which: tuple(seconds) for which, seconds in times.items()})
    medians = {which: Spread.of(seconds).median for which, seconds in times.items()}
    return BenchLayer(
        name=name,
        batch_size=size,
        kind=layer.kind.value,
        weight_shape=layer.weight_shape,
        granularity=layer.granularity.value,
        seconds_static=medians[STATIC],
        seconds_output=medians[OUTPUT],
        seconds_fully_dynamic=medians[FULL],
        over_static=found.ratio(OUTPUT, STATIC).median,
        fully_dynamic_over_static=found.ratio(FULL, STATIC).median,
        path=path,
    )
