"""Partially dynamic layers. They know no model, no policy and no file."""

from padconvert.layers.build import build_layer, build_static, upcycle
from padconvert.layers.conv import PadConv1d, PadConv2d, PadConv3d
from padconvert.layers.facts import LayerFacts
from padconvert.layers.linear import PadLinear
from padconvert.layers.pad import Moved, PadLayer

__all__ = [
    "LayerFacts",
    "Moved",
    "PadConv1d",
    "PadConv2d",
    "PadConv3d",
    "PadLayer",
    "PadLinear",
    "build_layer",
    "build_static",
    "upcycle",
]
