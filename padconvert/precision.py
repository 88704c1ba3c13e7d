"""Half-precision models are trained in fp32 and stored as they came."""

from __future__ import annotations

import torch
from torch import nn

from padconvert.rewrite import pad_layers

HALF = (torch.float16, torch.bfloat16)


def upcast_(model: nn.Module) -> nn.Module:
    """The model in fp32, in place, if any of its parameters is in half precision."""
    return model.float() if any(p.dtype in HALF for p in model.parameters()) else model


def restore_dtypes_(model: nn.Module, source: nn.Module) -> nn.Module:
    """Give a folded model the dtypes of its source; routers stay in fp32."""
    wanted = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    layers = pad_layers(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in wanted and tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted[name].dtype)
    for name, layer in layers.items():
        dtype = source.get_submodule(name).weight.dtype
        for part in ("weight_static", "weight_dynamic", "bias_static", "bias_dynamic"):
            stored = getattr(layer, part)
            if stored is not None:
                stored.data = stored.data.to(dtype)
    return model
