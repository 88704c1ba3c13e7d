"""Put Pad layers in the place of static ones: build every replacement first, then swap them in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from padconvert.errors import PolicyError
from padconvert.layers.build import Static, build_layer, facts_of_static, is_transposed, upcycle, weight_of
from padconvert.layers.ffn import join_groups_
from padconvert.layers.pad import PadLayer
from padconvert.layers.routers import router_class
from padconvert.plan import LayerPlan, Plan
from padconvert.words import Place, Verdict


def rewrite_(model: nn.Module, plan: Plan) -> dict[str, PadLayer]:
    """Replace the plan's layers in `model` by fully dynamic ones that compute the same (κ = 1, equal experts).

    Returns the new layers by name. Nothing is swapped before all replacements are built. Raises PolicyError where
    the model is itself the layer, so that there is nothing to hang a replacement on.
    """
    converted = [(index, entry) for index, entry in enumerate(plan.layers) if entry.verdict is Verdict.CONVERT]
    built = {entry.info.name: _replacement(model, entry, plan.seed, index) for index, entry in converted}
    names = {name: alias for _, entry in converted for name, alias in _all_names(entry)}
    swap_(model, {name: built[primary] for name, primary in names.items()})
    join_groups_(model)
    return built


def _all_names(entry: LayerPlan) -> list[tuple[str, str]]:
    return [(name, entry.info.name) for name in (entry.info.name, *entry.info.aliases)]


def _replacement(model: nn.Module, entry: LayerPlan, seed: int, index: int) -> PadLayer:
    choice = entry.choice
    assert choice is not None
    layer = _planned_layer(model, entry)
    return upcycle(
        layer,
        num_experts=choice.num_experts,
        granularity=choice.granularity,
        router=choice.router,
        routing=choice.routing,
        learned_scales=choice.scales == "both",
        top_k=choice.top_k,
        group=choice.group,
        place=entry.info.place if choice.group else Place.ALONE,
        generator=router_generator(seed, index),
    )


def _planned_layer(model: nn.Module, entry: LayerPlan) -> Static:
    """The layer that the plan means. Raises PolicyError where the model has another one, or none, in its place."""
    name = entry.info.name
    found = dict(model.named_modules(remove_duplicate=False)).get(name)
    if isinstance(found, PadLayer):
        raise PolicyError(
            f"layer '{name}' is dynamic already; rewrite_ takes the static model that the plan was made for."
        )
    known = isinstance(found, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) or (found and is_transposed(found))
    if not known or tuple(weight_of(cast(Static, found)).shape) != entry.info.weight_shape:
        what = "no such layer" if found is None else f"another one there ({type(found).__name__})"
        raise PolicyError(
            f"layer '{name}': the model has {what}; make a plan of this model with padconvert.plan(model)."
        )
    return cast(Static, found)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own on the same memory, so that it needs hardly any."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def empty_layer(model: nn.Module, entry: LayerPlan, seed: int, index: int) -> PadLayer:
    """What upcycling, partition and folding make of a layer, without its values: they are on the meta device, and its
    router is set without data. The plan must say how many units stay dynamic."""
    assert entry.n_dynamic is not None
    assert entry.n_bias_dynamic is not None
    choice = entry.choice
    assert choice is not None
    facts = facts_of_static(
        _planned_layer(model, entry),
        num_experts=choice.num_experts,
        granularity=choice.granularity,
        router=choice.router,
        routing=choice.routing,
        top_k=choice.top_k,
        group=choice.group,
        place=entry.info.place if choice.group else Place.ALONE,
    )
    empty = build_layer(replace(facts, n_dynamic=entry.n_dynamic, n_bias_dynamic=entry.n_bias_dynamic), "meta")
    for part in empty.parts:
        dynamic = getattr(empty, f"{part}_dynamic")
        if dynamic is not None:
            empty.register_parameter(f"{part}_dynamic", nn.Parameter(dynamic.detach()[:1].expand(dynamic.shape)))
    if facts.has_router:
        empty.router = router_class(facts.router)(empty.router_channels, facts.num_experts, facts.top_k)
        empty.router.initialise_(None, router_generator(seed, index))
        empty.router.fold_()
    return empty


def router_generator(seed: int, index: int) -> torch.Generator:
    # a layer's router depends on its place alone, not on which other layers are converted
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def swap_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Set every named submodule. All parents are looked up before the first one is changed."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, module in replacements.items():
        if not name:
            raise PolicyError(
                "The model is itself a single layer, so there is no parent to hang its replacement on. "
                "Save it inside a container, for example torch.nn.Sequential(layer)."
            )
        parent, _, child = name.rpartition(".")
        places.append((model.get_submodule(parent), child, module))
    for holder, child, module in places:
        holder.register_module(child, module)


def pad_layers(model: nn.Module) -> dict[str, PadLayer]:
    """The Pad layers of a model by their first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PadLayer)}


def names_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """All names of a submodule, in module order."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
