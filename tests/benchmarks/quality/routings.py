"""Other first routings than the product's, tried as ideas: one grouping of the samples for the whole network.

K-means groups what each layer sees on its own, so a sample may meet expert 1 in one layer and expert 3 in the next.
Here samples are grouped once, and every router learns (ridge regression on its standardised pooled inputs) to say the
group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from padconvert.finetune.objectives import forward
from padconvert.finetune.routing import MOST_POINTS, pooled_inputs
from padconvert.finetune.train import Trainer
from padconvert.layers.kmeans import kmeans, sharpness
from padconvert.layers.pad import PadLayer
from padconvert.layers.routers.linear import Router
from padconvert.rewrite import pad_layers

RIDGE = 1e-2  # of the inputs' variance, which is 1

#: (each layer's standardised pooled inputs, labels, K, generator) → group of each sample [N]
Grouping = Callable[[list[Tensor], Tensor, int, Generator], Tensor]


def by_last_layer(seen: list[Tensor], labels: Tensor, experts: int, generator: Generator) -> Tensor:
    """Samples that the deepest converted layer sees as alike."""
    del labels
    return torch.cdist(seen[-1], kmeans(seen[-1], experts, generator)).argmin(1)


def by_first_layer(seen: list[Tensor], labels: Tensor, experts: int, generator: Generator) -> Tensor:
    """Samples that look alike."""
    del labels
    return torch.cdist(seen[0], kmeans(seen[0], experts, generator)).argmin(1)


def by_class(seen: list[Tensor], labels: Tensor, experts: int, generator: Generator) -> Tensor:
    """Samples of classes whose means lie near each other in the deepest converted layer."""
    classes = labels.unique()
    means = torch.stack([seen[-1][labels == each].mean(0) for each in classes])
    group_of_class = torch.cdist(means, kmeans(means, experts, generator)).argmin(1)
    return group_of_class[torch.searchsorted(classes, labels)]


def by_random_directions(seen: list[Tensor], labels: Tensor, experts: int, generator: Generator) -> Tensor:
    """The random direction that a sample points to furthest in the deepest converted layer."""
    del labels
    directions_CK = torch.randn(seen[-1].shape[1], experts, generator=generator).to(seen[-1])
    return (seen[-1] @ nn.functional.normalize(directions_CK, dim=0)).argmax(1)


GROUPINGS: Mapping[str, Grouping] = {
    "last layer": by_last_layer,
    "first layer": by_first_layer,
    "classes": by_class,
    "random directions": by_random_directions,
}


def set_aligned_(model: nn.Module, trainer: Trainer, grouping: str) -> None:
    """Every router of `model` says the same grouping, as surely as `train.top_probability` asks."""
    layers = pad_layers(model)
    pooled, labels = _seen(model, layers, trainer)
    scales = [(points.mean(0), points.std(0).clamp_min(1e-6)) for points in pooled]
    standard = [(points - mean) / deviation for points, (mean, deviation) in zip(pooled, scales, strict=True)]
    experts = next(iter(layers.values())).num_experts
    generator, wanted = Generator().manual_seed(trainer.setting.seed), trainer.policy.train.top_probability
    assert wanted is not None, "an arm of the study says it"
    groups = GROUPINGS[grouping](standard, labels, experts, generator)
    target_NK = nn.functional.one_hot(groups, experts).double()
    for layer, points_NC, (mean, deviation) in zip(layers.values(), standard, scales, strict=True):
        assert isinstance(layer.router, Router), "only for linear routers"
        _set_(layer.router, points_NC, target_NK, mean, deviation, wanted)


def _seen(model: nn.Module, layers: Mapping[str, PadLayer], trainer: Trainer) -> tuple[list[Tensor], Tensor]:
    """Each layer's pooled inputs [N, C] in fp64, and the labels [N]."""
    batches = trainer.setting.batches
    read = [batches.at(step).to(trainer.setting.device, torch.float32) for step in range(MOST_POINTS // batches.size)]
    seen = pooled_inputs(model, layers, [functools.partial(forward, model, batch.inputs) for batch in read])
    labels = [batch.labels.cpu() for batch in read if batch.labels is not None]
    return [seen[name].double() for name in layers], torch.cat(labels)


@torch.no_grad()
def _set_(
    router: Router,
    points_NC: Tensor,
    target_NK: Tensor,
    mean_C: Tensor,
    deviation_C: Tensor,
    top_probability: float,
) -> None:
    share_K = target_NK.mean(0)
    covariance_CC = points_NC.T @ points_NC / len(points_NC)
    covariance_CC.diagonal().add_(RIDGE)
    weight_CK = torch.linalg.solve(covariance_CC, points_NC.T @ (target_NK - share_K) / len(points_NC))
    scale = sharpness(points_NC @ weight_CK + share_K, top_probability)
    router.weight.copy_(scale * weight_CK.T)
    router.bias.copy_(scale * share_K)
    router.mean, router.deviation = mean_C.to(router.weight), deviation_C.to(router.weight)
