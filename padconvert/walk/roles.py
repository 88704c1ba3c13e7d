"""What each layer is for, from the structure around it rather than from lists of architectures.

stem       the first convolution (call order, else module order), if no layer comes before it, or if it takes at most
           4 channels and is not the head
head       with a forward: every layer that makes an output with no layer after it; else the last linear layer,
           or the last convolution of a network without linear layers
depthwise  groups == in_channels > 1
attention  a linear layer or 1x1 convolution, named as a projection of queries, keys and values beside its likes,
           or in a module of few layers (not the model itself) whose class name holds "attention" or "attn"
ffn        linear layers d → h … h → d, h > d, next to each other under one parent (with gates: several d → h);
           a child that holds a single linear layer stands for it, which finds BERT's intermediate and output;
           a d → 2h before the h → d is a gate and an up in one
conv, linear   all others

The first that holds wins, but an ffn under an attention-like class further up than its own parent is an ffn.
Beside these the members of every block that a forward proves (`walk.groups`) are ffn, whatever they are called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from padconvert.walk.forward import Watched
from padconvert.walk.found import CONVOLUTIONS, Found
from padconvert.words import Kind, Role

MAX_IMAGE_CHANNELS = 4
# A module named after attention that holds more layers than this is a network of attentions, not one.
MAX_PROJECTIONS = 8

ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
# One of these alone is proof: nobody names anything else so.
FUSED = frozenset({"qkv", "qkv_proj", "query_key_value", "wqkv", "in_proj_qkv", "c_attn"})
OUTPUTS = frozenset({"o", "o_proj", "out_proj", "out_lin", "to_out", "wo", "proj", "c_proj"})
# A "key" or "value" alone may be a memory or a table; beside a query it is not.
QUERIES = frozenset({"q", "query", "q_proj", "q_lin", "to_q", "wq", "query_proj"})
BESIDE_A_QUERY = QUERIES | {
    *("k", "key", "k_proj", "k_lin", "to_k", "wk", "key_proj"),
    *("v", "value", "v_proj", "v_lin", "to_v", "wv", "value_proj"),
}


def find_roles(root: nn.Module, layers: Sequence[Found], watched: Watched | None) -> list[Role]:
    """One role a layer, in the layers' order."""
    heads = _heads(layers, watched)
    stem = _stem(layers, watched, heads)
    attention, ffn = _attention(root, layers), _ffn(root, layers)

    def role(index: int, layer: Found) -> Role:
        if index == stem:
            return Role.STEM
        if index in heads:
            return Role.HEAD
        if layer.kind in CONVOLUTIONS and layer.weight_shape and layer.groups == _in_channels(layer) > 1:
            return Role.DEPTHWISE
        if layer.module in ffn:
            return Role.FFN
        if layer.module in attention:
            return Role.ATTENTION
        return Role.LINEAR if layer.kind is Kind.LINEAR else Role.CONV

    return [role(index, layer) for index, layer in enumerate(layers)]


def _in_channels(layer: Found) -> int:
    return layer.weight_shape[1] * layer.groups


def _call_order(layers: Sequence[Found], watched: Watched | None) -> list[int]:
    """Indices by first call, without the ones never called; in module order where nothing was watched."""
    if watched is None:
        return list(range(len(layers)))
    return sorted(watched.seen, key=lambda index: watched.seen[index].order)


def _stem(layers: Sequence[Found], watched: Watched | None, heads: frozenset[int]) -> int | None:
    order = _call_order(layers, watched)
    first = next((index for index in order if layers[index].kind in CONVOLUTIONS), None)
    if first is None or not layers[first].weight_shape:
        return None
    image = _in_channels(layers[first]) <= MAX_IMAGE_CHANNELS and first not in heads
    return first if image or first == order[0] else None


def _heads(layers: Sequence[Found], watched: Watched | None) -> frozenset[int]:
    if watched is not None:
        return watched.heads
    linears = [index for index, layer in enumerate(layers) if layer.kind is Kind.LINEAR]
    return frozenset(linears[-1:] or range(len(layers))[-1:])


def _is_pointwise(layer: Found) -> bool:
    """Linear, or a convolution with kernel 1: what an attention projects with."""
    return layer.kind is Kind.LINEAR or (layer.kind in CONVOLUTIONS and set(layer.weight_shape[2:]) == {1})


def _attention(root: nn.Module, layers: Sequence[Found]) -> set[nn.Module]:
    """Projections by their own name beside their siblings' names, or by the class of a module around them."""
    pointwise = {layer.module for layer in layers if _is_pointwise(layer)}
    inside: set[nn.Module] = set()
    for parent in root.modules():
        held = pointwise.intersection(parent.modules())
        if parent is not root and ATTENTION_CLASS.search(type(parent).__name__) and len(held) <= MAX_PROJECTIONS:
            inside.update(held)
        projections = _projections({name.lower() for name in parent._modules})
        for name, child in parent._modules.items():
            if child is not None and name.lower() in projections:
                inside.update(child.modules())  # diffusers' to_out is a list that holds the linear layer
    return inside & pointwise


def _projections(siblings: set[str]) -> frozenset[str]:
    """Which names among these siblings are an attention's projections; none where no queries are made."""
    if siblings & QUERIES and len(siblings & BESIDE_A_QUERY) > 1:
        return FUSED | BESIDE_A_QUERY | OUTPUTS
    return FUSED | OUTPUTS if siblings & FUSED else frozenset()


def _ffn(root: nn.Module, layers: Sequence[Found]) -> set[nn.Module]:
    """Members of every d → h → d under one parent that is not attention-like itself."""
    linear = {layer.module: layer for layer in layers if layer.kind is Kind.LINEAR}
    members: set[nn.Module] = set()
    for parent in root.modules():
        if parent not in linear and (parent is root or not ATTENTION_CLASS.search(type(parent).__name__)):
            members.update(_members(_linears_in_a_row(parent, linear)))
    return members


def _linears_in_a_row(parent: nn.Module, linear: Mapping[nn.Module, Found]) -> list[Found | None]:
    """The children as linear layers: one that holds several is a gap (None), one that holds none is left out."""
    row: list[Found | None] = []
    for child in parent.children():
        held = [linear[module] for module in child.modules() if module in linear]
        if held:
            row.append(held[0] if len(held) == 1 else None)
    return row


def _members(row: Sequence[Found | None]) -> list[nn.Module]:
    """The up (and gate) layers d → h right before a down layer h → d, and that layer."""
    members: list[nn.Module] = []
    for index, down in enumerate(row):
        if down is None or len(down.weight_shape) != 2 or down.weight_shape[0] >= down.weight_shape[1]:
            continue
        outputs, hidden = down.weight_shape
        wide = ((hidden, outputs), (2 * hidden, outputs))
        ups: list[nn.Module] = []
        for up in reversed(row[:index]):
            if up is None or up.weight_shape not in wide:
                break
            ups.append(up.module)
            if up.weight_shape == wide[1]:
                break
        members += [*ups, down.module] if ups else []
    return members
