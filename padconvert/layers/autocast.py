"""Where a layer computes in the precision that it chose itself."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is cast on the device of `x`. While a model is exported this does nothing: there every such
    region would become a sub-graph of its own, which takes torch far longer than the layer."""
    if torch.compiler.is_exporting() or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
