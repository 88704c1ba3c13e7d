"""`LayerFacts`: all that is needed to build a Pad layer without its values. It is what a manifest stores."""

from __future__ import annotations

from dataclasses import dataclass

from padconvert.words import Granularity, Kind, Place, Routing

#: what a convolution's call needs beside its weights
CALL_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")

#: beyond any network's, by the number of spatial dimensions; padding past what the kernel spans reads zeros alone, so
#: it may do so by little
MOST_STEPS = 65_536
MOST_DILATION = {1: 65_536, 2: 256, 3: 256}
SPARE_PADDING = 64


def beyond_networks(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> str:
    """What of a convolution's call would allocate or skip more than any network does; "" for nothing."""
    if max(stride, default=1) > MOST_STEPS or max(dilation, default=1) > MOST_DILATION.get(len(kernel), 1):
        return f"stride {stride!r:.60} and dilation {dilation!r:.60}, which no network has"
    if isinstance(padding, str):
        return ""
    spans = [step * (width - 1) for step, width in zip(dilation, kernel, strict=True)]
    reaches = any(each > span + SPARE_PADDING for each, span in zip(padding, spans, strict=True))
    return f"padding {padding!r:.60} reaches far past its kernel" if reaches else ""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The shape of a Pad layer.

    `n_dynamic` counts units: entries for `element`, rows for `channel`, hidden units for `neuron`. `n_bias_dynamic`
    counts bias entries (for `channel` and `neuron` it equals `n_dynamic`, since the bias goes with its row; 0 without a
    bias, and for the `neuron` bias of an FFN's last layer, which is static).
    `top_k` of the experts are computed for a token (or sequence), 0 means all of them, mixed. Members of an FFN name
    its first member as their `group`; that one has the group's router, and with `neuron` its `dynamic_index`.
    `transposed`: the source stores the weight as [in, out] (transformers' Conv1D); `weight_shape` is [out, in] always.
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
    top_k: int = 0
    group: str = ""
    place: Place = Place.ALONE
    transposed: bool = False

    @property
    def has_router(self) -> bool:
        """Whether the router's tensors stand under this layer's name."""
        return self.place in (Place.ALONE, Place.FIRST)

    @property
    def unit_dim(self) -> int:
        """The dimension of the weight along which units lie: columns for the last layer of a `neuron` block."""
        return int(self.granularity is Granularity.NEURON and self.place is Place.LAST)
