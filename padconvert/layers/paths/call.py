"""The plain convolution behind every path: padding modes, and a batch of weights as groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from padconvert.layers.conv import PadConv

_CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}

#: entries of the weights that one grouped call works on, for each thread
GROUPED = 150_000


def convolution(layer: PadConv, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """One convolution of `x` with the layer's stride, dilation and padding."""
    x, padding = padded(layer, x)
    return _CONVOLUTIONS[layer.spatial](
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), layer.stride, padding, layer.dilation, groups
    )


def padded(layer: PadConv, x: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """The input and the padding left to do, as torch's layers: every mode but "zeros" pads beforehand."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    sides: list[int] = []
    for dimension in reversed(range(layer.spatial)):
        if layer.padding == "same":
            total = layer.dilation[dimension] * (layer.kernel_size[dimension] - 1)
            sides += [total // 2, total - total // 2]
        elif layer.padding == "valid":
            sides += [0, 0]
        else:
            amount = layer.padding[dimension]
            assert isinstance(amount, int)
            sides += [amount, amount]
    return torch.nn.functional.pad(x, sides, mode=layer.padding_mode), (0,) * layer.spatial


def by_sample(layer: PadConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each sample with its own weight, [B, O, I, *kernel] and [B, O]. Groups are samples, calls pieces of the batch."""
    size = piece_size(x.device.type, weight.shape[1:].numel(), len(x))
    if torch.compiler.is_compiling() or size >= len(x):
        return _grouped(layer, x, weight, bias)
    biases = [None] * -(-len(x) // size) if bias is None else bias.split(size)
    pieces = zip(x.split(size), weight.split(size), biases, strict=True)
    return torch.cat([_grouped(layer, *piece) for piece in pieces])


def piece_size(device: str, entries: int, batch: int) -> int:
    """Samples whose weights, of so many entries, share a call: what a core's cache holds. Past it the gradient of the
    weights takes three times as long. Other devices take the batch at once."""
    if device != "cpu":
        return batch
    threads = torch.get_num_threads()
    return max(GROUPED // entries, 1) * threads  # each of them takes some of a call's groups


def _grouped(layer: PadConv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch = len(x)
    together = x.reshape(1, batch * x.shape[1], *x.shape[2:])
    flat_bias = None if bias is None else bias.flatten()
    out = convolution(layer, together, weight.flatten(0, 1), flat_bias, batch * layer.groups)
    return out.reshape(batch, weight.shape[1], *out.shape[2:])
