"""What the walk says of a model: one `LayerInfo` a layer, with all its names and a reason code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from padconvert.walk.spec import ProbeSpec
from padconvert.words import Kind, Place, Reason, Role

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of the source.

    `name` is its first dotted name in module order, `aliases` all further names of the same module.
    `macs` (multiply-adds per sample), `calls` (per forward), `order` (of the first call) and the shapes
    (without the batch dimension) are None where no input was known.

    `group` is the first member's name where the layer belongs to a feed-forward block (FFN) that was proven to be one,
    else ""; a layer of role FFN that belongs to none has the words why in `detail`. `causal`: its sequence is read from
    left to right, so that nothing at a position depends on later ones (None: not known, or not on a sequence).
    `by_sample`: its inputs are [batch, …], with the positions that the network's attention_mask is about if it has one.
    """

    name: str
    aliases: tuple[str, ...]
    type: str  # class name, as in `Conv2d`
    kind: Kind
    role: Role
    eligible: bool
    reason: Reason
    weight_shape: tuple[int, ...]
    has_bias: bool
    groups: int
    dtype: str  # "float32", "bfloat16", …
    macs: int | None = None
    calls: int | None = None
    order: int | None = None
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    detail: str = ""  # extra words for a person, e.g. which parent reads the weight, what breaks a block
    group: str = ""
    place: Place = Place.ALONE
    causal: bool | None = None
    by_sample: bool | None = None


@dataclass(frozen=True, slots=True)
class Walk:
    """All layers of a model in module order, and how they were found."""

    layers: tuple[LayerInfo, ...]
    method: str  # "forward" (a real call was watched) or "tree" (the module tree only)
    notes: tuple[str, ...] = ()  # what had to be assumed, and why a forward was not possible
    mixtures: tuple[str, ...] = ()  # modules that are mixtures of experts already, with their class
    probe: ProbeSpec | None = None  # the inputs of the call
    outputs: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)  # what came of it: floating point
