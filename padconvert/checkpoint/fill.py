"""The tensors of a checkpoint → Pad layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from padconvert.checkpoint.layout import expected_tensors, join
from padconvert.checkpoint.manifest import LayerEntry
from padconvert.layers.build import build_layer
from padconvert.layers.facts import LayerFacts
from padconvert.layers.pad import PadLayer
from padconvert.words import Granularity, Place


def filled_layer(
    entry: LayerEntry, tensor_of: Callable[[str], Tensor], facts: LayerFacts | None = None, *, shared: bool = False
) -> PadLayer:
    """The layer with its stored values; equal experts are expanded to all K. `tensor_of` gives a stored tensor by its
    name in the layer, to be kept and written to. `facts` are the layer's where they are not the stored ones.

    `shared`: equal experts stay one in memory, and single entries are not indexed: to be called, not to be trained.
    """
    # without memory of its own: every parameter and every stored buffer is put in below
    layer = build_layer(facts or entry.facts, "meta")
    state: dict[str, Tensor] = {}
    for name in names_inside(entry):
        tensor = tensor_of(name)
        if entry.equal_experts and name.endswith("_dynamic"):
            tensor = tensor.expand(entry.facts.num_experts, *tensor.shape[1:])
            tensor = tensor if shared else tensor.clone()
        state[name] = tensor
    layer.is_lean = shared and entry.equal_experts and entry.facts.granularity is Granularity.ELEMENT
    layer.load_state_dict(state, assign=True)
    if layer.is_lean and entry.facts.place is not Place.ALONE:  # a block's members compute by index
        layer.register_forward_pre_hook(lambda module, _: module.lean_(False))
        layer.register_forward_hook(lambda module, _, __: module.lean_())
    return layer


def names_inside(entry: LayerEntry) -> list[str]:
    """The names that a converted layer's stored tensors have in the layer."""
    return [name[len(join(entry.name, "")) :] for name in expected_tensors(entry)]


def all_names_inside(entry: LayerEntry) -> list[str]:
    """All names that a converted layer's tensors have in the file, a placeholder's and those of its aliases too."""
    return [join(prefix, name) for prefix in (entry.name, *entry.aliases) for name in (*names_inside(entry), "weight")]
