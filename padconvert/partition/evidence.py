"""Gather what a score needs: mean routing weights and gradients, layer by layer, in eval mode.

Micro-batches are fixed, each is scored alone in the mixing dtype, and their sum is in fp64 and in their order: the
same weights give the same dynamic_mask wherever the micro-batches are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Generator, Tensor, nn

from padconvert.errors import VerificationError
from padconvert.layers.pad import PadLayer
from padconvert.layers.padding import real_tokens
from padconvert.partition.scores import Evidence, Need, Score
from padconvert.walk.quiet import evaluating
from padconvert.words import Granularity

Loss = Callable[[], Tensor]
#: (layer name, part) that units are cut from
Part = tuple[str, str]
#: units that turn static together, under the name of their first part, and all parts that hold a slice of them
Cuts = dict[Part, tuple[Part, ...]]


def cuts_of(layers: Mapping[str, PadLayer]) -> Cuts:
    """What is ranked: every part that still has something to turn static, in module order.

    A bias is ranked by itself with `element`. A filter brings its bias entry along, a hidden unit (`neuron`) all that
    its feed-forward block has of it.
    """
    cuts: Cuts = {}
    for name, layer in layers.items():
        match layer.granularity:
            case Granularity.ELEMENT:
                cuts |= {(name, part): ((name, part),) for part in layer.parts}
            case Granularity.CHANNEL:
                cuts[name, "weight"] = tuple((name, part) for part in layer.unit_parts)
            case Granularity.NEURON:
                slices = tuple((name, part) for part in layer.unit_parts)
                first = (layer.group, "weight")
                cuts[first] = cuts.get(first, ()) + slices
            case _:
                assert_never(layer.granularity)
    return {key: cut for key, cut in cuts.items() if getattr(layers[key[0]], f"{key[1]}_dynamic") is not None}


def router_of(layers: Mapping[str, PadLayer], name: str) -> str:
    """The name of the layer that routes for this one: itself, or its block's first member."""
    return layers[name].group or name


def measure(
    model: nn.Module, layers: Mapping[str, PadLayer], score: Score, losses: Sequence[Loss], generator: Generator
) -> tuple[dict[Part, Tensor], dict[str, Tensor]]:
    """(score of every still-dynamic unit [D] fp64, mean routing weights π̄ [K] fp64 of every layer).

    Raises VerificationError naming the layer where a score is not finite.
    """
    cuts = cuts_of(layers)
    with evaluating(model):  # BatchNorm in train mode would mix the samples of a micro-batch
        mean_routing = _mean_routing(layers, losses)
        totals: dict[Part, Tensor] = {}
        count = 0
        for gradients in _gradients(layers, score.NEEDS, losses):
            count += 1
            for key, cut in cuts.items():
                evidence = _evidence(cut, layers, gradients, mean_routing[key[0]], generator)
                total = score.contribution(evidence).double().cpu()
                totals[key] = totals[key] + total if key in totals else total
    scores = {key: score.finish(total, count) for key, total in totals.items()}
    for (name, part), values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise VerificationError(
                f"layer '{name}': the score of its {part} is not finite. Lower the learning rate (train.lr), "
                "or look for extreme values in the data."
            )
    return scores, mean_routing


def _mean_routing(layers: Mapping[str, PadLayer], losses: Sequence[Loss]) -> dict[str, Tensor]:
    """π̄ of every layer over all samples or tokens; uniform where no data was routed."""
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items() if layer.router}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, args: Any, routing: Tensor) -> None:
            del module, args
            sums[name] += real_tokens(routing.detach()).double().sum(0).cpu()

        return add

    hooks = [layer.router.register_forward_hook(watch(name)) for name, layer in layers.items() if layer.router]
    try:
        with torch.no_grad():
            for loss in losses:
                loss()
    finally:
        for hook in hooks:
            hook.remove()
    means = {
        name: total / total.sum() if float(total.sum()) > 0 else torch.full_like(total, 1 / len(total))
        for name, total in sums.items()
    }
    return {name: means[router_of(layers, name)] for name in layers}


def _gradients(
    layers: Mapping[str, PadLayer], need: Need, losses: Sequence[Loss]
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """∂L/∂D of every layer and part, one dictionary a loss; a single empty one where no gradient is needed."""
    if need in (Need.WEIGHTS, Need.ROUTING):
        yield {}
        return
    keys = [
        (name, part)
        for name, layer in layers.items()
        for part in layer.parts
        if getattr(layer, f"{part}_dynamic") is not None
    ]
    parameters = [getattr(layers[name], f"{part}_dynamic") for name, part in keys]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        for loss in losses:
            gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
            yield {
                key: torch.zeros_like(parameter) if gradient is None else gradient
                for key, parameter, gradient in zip(keys, parameters, gradients, strict=True)
            }
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@torch.no_grad()
def _evidence(
    cut: Sequence[Part],
    layers: Mapping[str, PadLayer],
    gradients: Mapping[Part, Tensor],
    mean_routing_K: Tensor,
    generator: Generator,
) -> Evidence:
    """The values and gradients of all slices of the cut's units, side by side."""
    dynamic, gradient = [], []
    for name, part in cut:
        layer = layers[name]
        values = layer.cut_part(part)[1]
        assert values is not None
        dynamic.append(values)
        if gradients:
            # the gradient of the scaled value: ∂L/∂(λ_d D) = ∂L/∂D / λ_d
            _, dynamic_scale = layer.scales()
            gradient.append(layer.view(part).cut_packed(gradients[name, part]).to(values.dtype) / dynamic_scale)
    return Evidence(
        dynamic_KUS=torch.cat(dynamic, -1),
        mean_routing_K=mean_routing_K.to(dynamic[0]),
        generator=generator,
        gradient_KUS=torch.cat(gradient, -1) if gradient else None,
    )
