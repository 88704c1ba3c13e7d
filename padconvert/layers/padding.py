"""Which positions of a batch are padding: said once a call, beside the model's forward, for the layers that route.

    with attending(attention_mask):     # [B, T], non-zero where a token is real; None: all are
        model(inputs)

A layer routed by its sequence averages real tokens only, and padding is no evidence of how experts are used.
`watch_padding_` hangs that onto a model, so that its callers need not know.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NAME = "attention_mask"


class _Call(threading.local):
    mask_BT: Tensor | None = None


_call = _Call()


@contextmanager
def attending(mask_BT: Tensor | None) -> Iterator[None]:
    """Within, positions where the mask is 0 are padding."""
    before, _call.mask_BT = _call.mask_BT, mask_BT
    try:
        yield
    finally:
        _call.mask_BT = before


def real_tokens(value: Tensor) -> Tensor:
    """[B, T, ..., C] or [N, C] → [N, C] without the padded positions, where the call's mask fits the shape."""
    mask_BT = _call.mask_BT
    if mask_BT is not None and value.dim() == 3 and value.shape[:2] == mask_BT.shape:
        return value[mask_BT.bool()]
    return value.reshape(-1, value.shape[-1])


def sequence_mean(x: Tensor) -> Tensor:
    """[B, T, ..., C] → [B, C], over the real positions. Raises RuntimeError where the call's mask has another shape."""
    mask_BT = _call.mask_BT
    if mask_BT is None:
        return x.flatten(1, -2).mean(1)
    if x.dim() != 3 or tuple(mask_BT.shape) != tuple(x.shape[:2]):
        raise RuntimeError(
            f"routing by sequence needs an {NAME} [batch, positions] for inputs {list(x.shape)}; "
            f"this call's is {list(mask_BT.shape)}"
        )
    weight_BT1 = mask_BT.to(x.dtype)[..., None]
    return (x * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)


def watch_padding_(model: nn.Module) -> None:
    """From now on a call's `attention_mask` reaches the layers of `model`. Doing it twice changes nothing."""
    if not any(hook is _enter for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)


def ignore_padding_(model: nn.Module) -> None:
    """The inverse: a model without the hooks, as it was before."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                flags.pop(key, None)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    mask = kwargs.get(NAME)
    if mask is None and args:
        names = list(inspect.signature(model.forward).parameters)
        place = names.index(NAME) if NAME in names else len(args)
        mask = args[place] if place < len(args) else None
    if isinstance(mask, Tensor):
        _call.mask_BT = mask


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    del model, args, output
    _call.mask_BT = None
