"""Gather what a score needs: mean routing weights and gradients, layer by layer, in eval mode.

Sums run over fixed micro-batches in fp64, so that the same weights give the same dynamic_mask wherever the
micro-batches are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from padconvert.errors import VerificationError
from padconvert.layers.pad import PadLayer
from padconvert.partition.scores import Evidence, Need, Score
from padconvert.walk.quiet import evaluating
from padconvert.words import Granularity

Loss = Callable[[], Tensor]
#: (layer name, part): a bias is a part of its own with `element`; with `channel` it belongs to its filter
Part = tuple[str, str]


def parts_of(layers: Mapping[str, PadLayer]) -> list[Part]:
    """Every (layer, part) that still has something to turn static, in module order."""
    return [
        (name, part)
        for name, layer in layers.items()
        for part in (layer.parts if layer.granularity is Granularity.ELEMENT else ("weight",))
        if getattr(layer, f"{part}_dynamic") is not None
    ]


def measure(
    model: nn.Module, layers: Mapping[str, PadLayer], score: Score, losses: Sequence[Loss], generator: Generator
) -> tuple[dict[Part, Tensor], dict[str, Tensor]]:
    """(score of every still-dynamic unit [D] fp64, mean routing weights π̄ [K] fp64 of every layer).

    Raises VerificationError naming the layer where a score is not finite.
    """
    with evaluating(model):  # BatchNorm in train mode would mix the samples of a micro-batch
        mean_routing = _mean_routing(layers, losses)
        totals: dict[Part, Tensor] = {}
        count = 0
        for gradients in _gradients(layers, score.NEEDS, losses):
            count += 1
            for key in parts_of(layers):
                evidence = _evidence(key, layers[key[0]], gradients, mean_routing[key[0]], generator)
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
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, args: Any, routing: Tensor) -> None:
            del module, args
            sums[name] += routing.detach().reshape(-1, routing.shape[-1]).double().sum(0).cpu()

        return add

    hooks = [layer.router.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for loss in losses:
                loss()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: total / total.sum() if float(total.sum()) > 0 else torch.full_like(total, 1 / len(total))
        for name, total in sums.items()
    }


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
    key: Part, layer: PadLayer, gradients: Mapping[Part, Tensor], mean_routing_K: Tensor, generator: Generator
) -> Evidence:
    """A part's values and gradients as units; a filter brings its bias entry along."""
    name, part = key
    parts = layer.parts if layer.granularity is Granularity.CHANNEL else (part,)
    _, dynamic_scale = layer.scales()
    dynamic, gradient = [], []
    for each in parts:
        values = layer.cut_part(each)[1]
        assert values is not None
        dynamic.append(values.double())
        if gradients:
            # the gradient of the scaled value: ∂L/∂(λ_d D) = ∂L/∂D / λ_d
            gradient.append(layer.view(each).cut_packed(gradients[name, each]).double() / dynamic_scale)
    return Evidence(
        dynamic_KUS=torch.cat(dynamic, -1),
        mean_routing_K=mean_routing_K.to(dynamic[0]),
        generator=generator,
        gradient_KUS=torch.cat(gradient, -1) if gradient else None,
    )
