"""The networks that are timed beside each other, and what a call of one takes in memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padconvert.layers.build import build_layer
from padconvert.layers.ffn import join_groups_
from padconvert.layers.pad import PadLayer
from padconvert.rewrite import names_of, pad_layers, swap_

STATIC, OUTPUT, FULL = "static", "padconvert", "fully dynamic"
#: the arguments of one call of a network
Call = tuple[tuple[Any, ...], Mapping[str, Any]]

#: how far experts are moved apart, in units of their tensor's standard deviation
APART = 0.1
_RESET_PEAK = "5"  # what /proc/self/clear_refs takes for that


def fully_dynamic(model: nn.Module) -> nn.Module:
    """A copy of a partially dynamic network with κ = 1: the same routers, and all K experts whole in every converted
    layer (a static entry is then K equal ones; see `make_unequal_`)."""
    full = copy.deepcopy(model)
    replacements: dict[str, nn.Module] = {}
    for layer in pad_layers(full).values():
        replacements |= dict.fromkeys(names_of(full, layer), _full_layer(layer))
    swap_(full, replacements)
    join_groups_(full)
    return full


@torch.no_grad()
def _full_layer(layer: PadLayer) -> PadLayer:
    facts = layer.facts()
    rows = facts.weight_shape[0] if facts.has_bias and not facts.unit_dim else 0
    full = build_layer(replace(facts, n_dynamic=layer.view("weight").units, n_bias_dynamic=rows), layer.weight.device)
    full.router = layer.router
    for part in layer.parts:
        view, experts_K = full.view(part), layer.expert_tensors(part)
        # the bias of a `neuron` block's last layer is one for all experts
        for name, values in ((f"{part}_static", experts_K[0]), (f"{part}_dynamic", experts_K)):
            stored = getattr(full, name)
            if stored is not None:
                stored.copy_(view.as_packed(view.cut_full(values)))
    return full.train(layer.training)


@torch.no_grad()
def make_unequal_(model: nn.Module, seed: int = 0) -> int:
    """Move equal experts apart, in place, so that no way of computing gains by their being equal. Returns how many
    layers had some; trained ones are left as they are."""
    generator = torch.Generator().manual_seed(seed)
    layers = 0
    for layer in pad_layers(model).values():
        moved = [_move_apart_(getattr(layer, f"{part}_dynamic"), generator) for part in layer.parts]
        layers += any(moved)
    return layers


def _move_apart_(experts_K: torch.Tensor | None, generator: torch.Generator) -> bool:
    if experts_K is None or not bool((experts_K[1:] == experts_K[:1]).all()):
        return False
    noise = torch.randn(experts_K.shape, generator=generator).to(experts_K)
    scale = experts_K.float().std() if experts_K.numel() > 1 else torch.ones(())
    experts_K += APART * noise * scale.clamp_min(1e-3).to(experts_K)
    return True


def bytes_of(model: nn.Module) -> int:
    """Bytes of all tensors of a network, each once."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory at the peak of a call above what was held before; None where the system does not say.

    On the CPU the growth of the process's resident memory, which Linux keeps; on a GPU what torch's allocator says.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of earlier calls would hide the growth
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
        call()
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError, StopIteration):
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
