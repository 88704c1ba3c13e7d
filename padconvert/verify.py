"""Two models, one batch, and the numbers between them: the receipts of a conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.errors import VerificationError
from padconvert.layers import PadLayer
from padconvert.results import Equality
from padconvert.rewrite import pad_layers
from padconvert.walk.probe import call, flat_outputs

#: max|Δ| / max|y| that a function-preserving rewrite may show; half precision is checked upcast to fp32
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
HALF = (torch.float16, torch.bfloat16)

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def equality_by_forward(source: nn.Module, model: nn.Module, calls: Sequence[Call]) -> Equality:
    """Outputs of both models on the same inputs in eval mode, without training in between.

    Raises VerificationError where a converted layer is never called, for then it would be bypassed silently.
    """
    source, model, calls = _upcast(source), _upcast(model), [_upcast_call(each) for each in calls]
    dtype = _float_dtype(source)
    called: set[str] = set()
    max_abs = max_rel = 0.0
    samples = 0
    with _evaluating(source), _evaluating(model), _watching(pad_layers(model), called), torch.no_grad():
        for args, kwargs in calls:
            expected = flat_outputs(call(source, args, kwargs))
            found = flat_outputs(call(model, args, kwargs))
            difference, relative = distance(expected, found)
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
            samples += len(next(iter([*args, *kwargs.values()])))
    never = [name for name in pad_layers(model) if name not in called]
    if never:
        raise VerificationError(
            f"layer '{never[0]}' was converted but the model's forward never calls it (its weight is read by "
            f"another module, or not used at all). Keep it static: --set 'rules=[{{name: {never[0]}, convert: false}}]'."
        )
    tolerance = TOLERANCE[dtype]
    return Equality("forward", max_abs, max_rel, tolerance, max_rel <= tolerance, samples)


def equality_by_weights(source: nn.Module, model: nn.Module) -> Equality:
    """max |Σ_k π_k D_k − W| over all converted layers: for models that cannot be called here.

    Every expert is held against the static weight, which covers all routing weights at once.
    """
    max_abs = max_rel = 0.0
    dtype = torch.float32
    for name, layer in pad_layers(model).items():
        static = source.get_submodule(name)
        dtype = layer.mixing_dtype
        for part in layer.parts:
            expected = getattr(static, part).detach().to(dtype)
            difference, relative = distance(
                [expected.expand(layer.num_experts, *expected.shape)], [layer.expert_tensors(part).detach()]
            )
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
    tolerance = TOLERANCE[dtype]
    return Equality("weights", max_abs, max_rel, tolerance, max_rel <= tolerance, 0)


def distance(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """(max|Δ|, the largest max|Δ| / max|y| of an output); infinite where shapes or non-finite places differ."""
    if len(expected) != len(found) or any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        return float("inf"), float("inf")
    max_abs = max_rel = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = float((a - b).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0).max()) if a.numel() else 0.0
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        max_abs = max(max_abs, difference)
        max_rel = max(max_rel, difference / scale if scale > 0 else difference)
    return max_abs, max_rel


@contextmanager
def _watching(layers: Mapping[str, PadLayer], called: set[str]) -> Iterator[None]:
    """Note which layers a forward calls."""

    def note(name: str) -> Any:
        return lambda module, args: called.add(name)  # noqa: ARG005

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _float_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _upcast(model: nn.Module) -> nn.Module:
    """The model itself, or an fp32 copy where it holds half-precision parameters."""
    if any(p.dtype in HALF for p in model.parameters()):
        return copy.deepcopy(model).float()
    return model


def _upcast_call(each: Call) -> Call:
    args, kwargs = each

    def up(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value

    return tuple(up(value) for value in args), {key: up(value) for key, value in kwargs.items()}
