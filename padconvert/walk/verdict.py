"""What the module tree alone says of a layer: can it be converted, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from padconvert.layers.facts import beyond_networks
from padconvert.walk.found import Found, conv1d_base
from padconvert.words import Kind, Reason

SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# torch's own parents that take a child's weight instead of calling the child: always, or in eval mode.
READERS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def find_readers(root: nn.Module) -> dict[nn.Module, str]:
    """Children whose weight a torch parent reads, with words that name the parent."""
    read: dict[nn.Module, str] = {}
    for name, parent in root.named_modules():
        for base, children in READERS:
            if isinstance(parent, base):
                words = f"read by {name or 'the model itself'} ({type(parent).__name__})"
                read.update({child: words for key in children if (child := parent._modules.get(key)) is not None})
    return read


def judge(
    layer: Found,
    ties: Mapping[nn.Module, tuple[str, ...]],
    readers: Mapping[nn.Module, str],
    experts: Mapping[nn.Module, str],
) -> tuple[Reason, str]:
    """The first reason that holds, and extra words for a person; `eligible` when none does."""
    module = layer.module
    if layer.base is None:
        return Reason.ALREADY_DYNAMIC, ""
    if module in experts:
        return Reason.ALREADY_EXPERTS, experts[module]
    reason, detail = _judge_alone(layer)
    if reason is not Reason.ELIGIBLE:
        return reason, detail
    if module in ties:
        return Reason.TIED_WEIGHT, f"shared with {', '.join(ties[module])}"
    if module in readers:
        return Reason.WEIGHT_READ_BY_PARENT, readers[module]
    return Reason.ELIGIBLE, ""


def _judge_alone(layer: Found) -> tuple[Reason, str]:
    """What the layer shows without its surroundings."""
    module = layer.module
    weight = module._parameters.get("weight")
    if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
        return Reason.UNINITIALIZED, ""
    if layer.kind is Kind.CONV_TRANSPOSE:
        return Reason.TRANSPOSED_CONVOLUTION, ""
    if not isinstance(weight, nn.Parameter) or "parametrizations" in module._modules:
        return Reason.PARAMETRIZED, ""
    if changed := _own_code(layer):
        return Reason.CUSTOM_FORWARD, changed
    if hooks := [name.strip("_") for name in HOOKS if getattr(module, name, None)]:
        return Reason.HAS_HOOKS, ", ".join(hooks)
    if type(weight.data) is not torch.Tensor:  # a quantised or distributed weight says a dtype that is not stored
        return Reason.UNSUPPORTED_DTYPE, type(weight.data).__name__
    if weight.dtype not in SUPPORTED:
        return Reason.UNSUPPORTED_DTYPE, str(weight.dtype).removeprefix("torch.")
    if weight.is_meta:
        return Reason.META_WEIGHT, ""
    if isinstance(module, nn.modules.conv._ConvNd):
        beyond = beyond_networks(module.kernel_size, module.stride, module.padding, module.dilation)
        if beyond:
            return Reason.BEYOND_NETWORKS, beyond
    return Reason.ELIGIBLE, ""


def _own_code(layer: Found) -> str:
    """Words for what the layer has and its base class has not, on its class or on the object; "" for nothing."""
    kind, base = type(layer.module), layer.base
    if conv1d_base(layer.module) is base is not kind:
        return f"{kind.__name__} is a class of its own above transformers' Conv1D"
    for method in ("forward", "_conv_forward", "__call__"):
        if getattr(kind, method, None) is not getattr(base, method, None) or method in layer.module.__dict__:
            return f"{kind.__name__}.{method} is not torch's"
    own = [*layer.module._modules, *layer.module._buffers, *(set(layer.module._parameters) - {"weight", "bias"})]
    return f"{kind.__name__} holds {', '.join(own)} beside weight and bias" if own else ""
