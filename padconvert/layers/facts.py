"""`LayerFacts`: all that is needed to build a Pad layer without its values. It is what a manifest stores."""

from __future__ import annotations

from dataclasses import dataclass

from padconvert.words import Granularity, Kind, Routing

#: what a convolution's call needs beside its weights
CALL_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The shape of a Pad layer.

    `n_dynamic` counts units: entries for `element`, rows for `channel`. `n_bias_dynamic` counts bias entries
    (for `channel` it equals `n_dynamic`, since the bias goes with its filter; 0 without a bias).
    Convolutions carry `stride`, `padding` (numbers, or "same"/"valid"), `dilation`, `groups`, `padding_mode`.
    """

    kind: Kind
    granularity: Granularity
    num_experts: int
    weight_shape: tuple[int, ...]
    dtype: str
    has_bias: bool
    n_dynamic: int
    n_bias_dynamic: int
    router: str
    routing: Routing
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
