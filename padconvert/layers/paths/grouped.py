"""Rows that are sorted by expert through their experts' weights: one grouped product where a device has a kernel for
it, else one product an expert.

Legend of names: N rows, K experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padconvert.layers.paths.dispatch import Dispatch

#: the kernel takes its operands in pieces of so many bytes
ALIGNED = 16


def serves(x: Tensor) -> bool:
    """Whether there is a kernel: on a GPU, for bfloat16, where moreover no CPU has to wait for the number of rows of
    each expert. Elsewhere torch has the loop itself, and a slower one."""
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16 or len(x) == 0:
        return False
    free = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"))
    return free and torch.cuda.get_device_capability(x.device) >= (8, 0)


def suits(weight_KOI: Tensor) -> bool:
    """Whether the kernel takes these weights: each expert's own, and rows of inputs and of outputs in whole pieces."""
    whole = all(size * weight_KOI.element_size() % ALIGNED == 0 for size in weight_KOI.shape[1:])
    return whole and weight_KOI.is_contiguous() and weight_KOI.data_ptr() % ALIGNED == 0


def linear(rows_NI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None, rows: Dispatch) -> Tensor:
    """Each sorted row by its own expert: [N, I] → [N, O], in one product. Weights must suit."""
    out_NO = torch.nn.functional.grouped_mm(rows_NI, weight_KOI.transpose(1, 2), offs=rows.ends_K)
    return out_NO if bias_KO is None else out_NO + bias_KO.index_select(0, rows.expert_N)


def linear_by_loop(rows_NI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None, rows: Dispatch) -> Tensor:
    """As `linear`, one product an expert."""
    # taken apart once: the gradient of `weight_KOI[k]` would be a whole [K, O, I] for every k
    biases = [None] * len(weight_KOI) if bias_KO is None else list(bias_KO.unbind())
    experts = zip(rows_NI.split(rows.counts), weight_KOI.unbind(), biases, strict=True)
    return torch.cat([torch.nn.functional.linear(given, weight, bias) for given, weight, bias in experts])
