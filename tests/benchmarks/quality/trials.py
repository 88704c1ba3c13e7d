"""Ideas that the product does not have, tried on top of it: settings under `study.` of an arm, one function each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from padconvert.finetune.loop import Run
from padconvert.layers.conv import PadConv2d
from padconvert.layers.pad import Moved, PadLayer
from padconvert.layers.routers.linear import Router
from padconvert.partition import Partitioner
from padconvert.rewrite import pad_layers

#: of `Averaged`: the share of the steps it leaves out (with the default policy the rounds are over by then), and the
#: weight of the past in a step
BEGIN, DECAY = 0.7, 0.995
#: how far a batch moves what a router's inputs are standardised by
FOLLOW = 0.05


# ---- what a router reads -----------------------------------------------------------------------------------------


class ReadsDeviations(PadConv2d):
    """Its router reads each channel's deviation over the map beside its mean: contrast, and texture."""

    @property
    def router_channels(self) -> int:
        return 2 * self.in_channels

    def pooled(self, x: Tensor) -> Tensor:
        mean_BC = super().pooled(x)
        square_BC = super().pooled(x.to(self.mixing_dtype).square())
        # where a channel is constant the root's gradient would be infinite
        return torch.cat([mean_BC, (square_BC - mean_BC.square()).clamp_min(1e-6).sqrt()], 1)


class ReadsTheLayerBefore(PadConv2d):
    """Its router also reads what that of the converted layer before it has read of the same samples."""

    before: ReadsTheLayerBefore | None
    own_BC: Tensor

    @property
    def router_channels(self) -> int:
        return self.in_channels + (self.before.in_channels if self.before is not None else 0)

    def pooled(self, x: Tensor) -> Tensor:
        self.own_BC = super().pooled(x)
        return self.own_BC if self.before is None else torch.cat([self.own_BC, self.before.own_BC], 1)

    def __getstate__(self) -> dict[str, Any]:
        """What it has read is a batch's, and no copy's."""
        return {name: value for name, value in self.__dict__.items() if name != "own_BC"}


def read_deviations_(model: nn.Module) -> None:
    for layer in _convolutions(model):
        layer.__class__ = ReadsDeviations
        _new_router_(layer)


def read_the_layer_before_(model: nn.Module) -> None:
    before = None
    for layer in _convolutions(model):
        layer.__class__ = ReadsTheLayerBefore
        layer.__dict__["before"] = before  # no child of this module: it would be saved and counted twice
        _new_router_(layer)
        before = layer


def _convolutions(model: nn.Module) -> list[PadLayer]:
    layers = list(pad_layers(model).values())
    assert all(type(layer) is PadConv2d for layer in layers), "tried on pictures only"
    return layers


def _new_router_(layer: PadLayer) -> None:
    layer.router = Router(layer.router_channels, layer.num_experts).to(layer.weight.device)


READERS: Mapping[str, Callable[[nn.Module], None]] = {
    "deviations": read_deviations_,
    "the layer before": read_the_layer_before_,
}


@torch.no_grad()
def follow_inputs(router: nn.Module, args: tuple[Tensor]) -> None:
    """Before a forward in training: what the router's inputs are standardised by moves towards this batch's."""
    if not router.training:
        return
    assert isinstance(router, Router)
    assert router.mean is not None
    assert router.deviation is not None
    deviation_C, mean_C = torch.std_mean(args[0].float().flatten(0, -2), 0, correction=0)
    router.mean.lerp_(mean_C, FOLLOW)
    router.deviation.lerp_(torch.where(deviation_C > 1e-6, deviation_C, router.deviation), FOLLOW)


def let_standards_follow(model: nn.Module) -> None:
    """A network that learns another task may move away from the inputs that routers were set by."""
    for layer in pad_layers(model).values():
        if layer.router is not None:
            layer.router.register_forward_pre_hook(follow_inputs)


# ---- how experts begin -------------------------------------------------------------------------------------------


@torch.no_grad()
def add_noise_(model: nn.Module, share: float, seed: int) -> None:
    """Experts that differ from the first step: normal noise of `share` of a weight's deviation, its mean over the
    experts zero. Only a uniform routing computes what the source did."""
    generator = Generator().manual_seed(seed)
    for layer in pad_layers(model).values():
        experts_KDS = layer.weight_dynamic
        assert experts_KDS is not None
        noise = torch.randn(experts_KDS.shape, generator=generator).to(experts_KDS)
        experts_KDS.add_((noise - noise.mean(0)) * share * experts_KDS.std())


# ---- what a newly static entry is worth --------------------------------------------------------------------------


class MeanOfExperts(Partitioner):
    """An entry that turns static becomes its experts' plain mean, however seldom one of them is chosen."""

    def _turn_static(self, layer: PadLayer, part: str, keep: Tensor, mean_routing_K: Tensor) -> list[Moved]:
        return super()._turn_static(layer, part, keep, torch.full_like(mean_routing_K, 1 / len(mean_routing_K)))


NEW_VALUES: Mapping[str, type[Partitioner]] = {"mean of the experts": MeanOfExperts}

# ---- what is kept of a training ----------------------------------------------------------------------------------


class Averaged:
    """A keeper (`loop.Keeper`) of the moving average of all parameters and statistics, from where the rounds are over;
    `finish_` puts it in their place."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def restore_(self, run: Run) -> None:
        del run

    def save(self, run: Run) -> None:
        del run

    @torch.no_grad()
    def step_done(self, run: Run) -> None:
        if run.step <= BEGIN * run.phases.steps:
            return
        for name, now in _floating(run.model):
            if name in self.average:
                self.average[name].lerp_(now, 1 - DECAY)
            else:
                self.average[name] = now.detach().clone()

    @torch.no_grad()
    def finish_(self, model: nn.Module) -> None:
        for name, now in _floating(model):
            now.copy_(self.average[name])


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    every = itertools.chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in every if tensor.is_floating_point())
