"""Loop: W(b) of every sample by one matmul, then one convolution a sample. Keeps a sample's map in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padconvert.layers.paths.call import convolution
from padconvert.layers.paths.case import Case, compute_dtype
from padconvert.layers.paths.cost import Machine, convolutions, mixing, placing, whole_weights
from padconvert.layers.paths.parts import mixed

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv


def unable(case: Case) -> str:
    """Why this path cannot compute the case; empty where it can."""
    return "a compiled program would hold one convolution for every sample" if case.compiled else ""


def seconds(case: Case, machine: Machine) -> float:
    return (
        mixing(case, machine)
        + whole_weights(case, machine)
        + convolutions(case, machine, case.batch)
        + placing(case.batch * case.outputs * (case.batch > 1), machine)
    )


def convolve(layer: PadConv, x: Tensor) -> Tensor:
    """[B, C, *spatial] → [B, O, *spatial']."""
    routing_BK, dtype = layer.route(x), compute_dtype(x)
    weights = mixed(layer, "weight", routing_BK).to(dtype).unbind()
    biases = mixed(layer, "bias", routing_BK).to(dtype).unbind() if layer.has_bias else [None] * len(x)
    samples = x.to(dtype).split(1)
    outs = [convolution(layer, *each, layer.groups) for each in zip(samples, weights, biases, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
