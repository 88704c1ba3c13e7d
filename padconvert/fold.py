"""Turn a trained Pad layer into its smallest equivalent: scales into the values, τ and standardisation into the router.

A layer whose units are all static becomes the plain torch layer again. Folding a folded model changes nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from padconvert.layers.build import build_static, is_transposed
from padconvert.layers.ffn import PadLinearMember
from padconvert.layers.pad import PadLayer
from padconvert.rewrite import names_of, pad_layers, swap_


def fold_(model: nn.Module) -> nn.Module:
    """Fold every Pad layer of `model` in place, under all its names. Returns the model."""
    replacements: dict[str, nn.Module] = {}
    for layer in pad_layers(model).values():
        folded = fold_layer_(layer)
        if folded is not layer:
            replacements |= dict.fromkeys(names_of(model, layer), folded)
    swap_(model, replacements)
    return model


@torch.no_grad()
def fold_layer_(layer: PadLayer) -> nn.Module:
    """Fold one layer in place; returns it, or the plain layer that computes the same if nothing in it is dynamic.

    A member of a feed-forward block becomes plain with its block only: its output is widened for the others.
    """
    if not any(each.is_dynamic for each in (layer.block.members if isinstance(layer, PadLinearMember) else [layer])):
        return plain_layer(layer)
    static_scale, dynamic_scale = layer.scales()
    for part in layer.parts:
        for name, scale in ((f"{part}_static", static_scale), (f"{part}_dynamic", dynamic_scale)):
            stored = getattr(layer, name)
            if stored is not None:
                stored.copy_(stored.to(layer.mixing_dtype) * scale)
    layer.scale_logit = None
    if layer.router is not None:
        layer.router.fold_()
    return layer


@torch.no_grad()
def plain_layer(layer: PadLayer) -> nn.Module:
    """The torch layer with the weight of the layer's first expert: an equivalent where nothing is dynamic, or where
    all experts are equal."""
    plain = build_static(layer.facts(), layer.weight.device)
    for part in layer.parts:
        target, value = getattr(plain, part), layer.expert_tensors(part)[0]
        target.copy_(value.T if part == "weight" and is_transposed(plain) else value)
        target.requires_grad_(layer.is_trainable(part))
    return plain.train(layer.training)
