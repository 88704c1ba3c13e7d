"""Is a sequence read from left to right? Seen by changing the last position of an input and calling again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from padconvert.walk.found import Found
from padconvert.walk.probe import call
from padconvert.walk.quiet import device_of, untouched
from padconvert.walk.spec import InputSpec, ProbeSpec
from padconvert.words import Kind

SHORTEST = 3
# Of the largest number: what a kernel may give differently for the same numbers.
TOLERANCE = 1e-6

Calls = dict[int, list[Tensor]]  # by layer number: the first sample's input [T, C] in each call


class Sequences:
    """Keeps what goes into the linear layers on [B, T, C], T as long as an input that is a sequence."""

    def __init__(self, layers: Sequence[Found], probe: ProbeSpec) -> None:
        self.layers = layers
        self.lengths = {spec.shape[0] for spec in probe.inputs if _is_sequence(spec)}
        self.calls: Calls = {}

    def keep(self, index: int, given: Tensor) -> None:
        """`given` went into a layer."""
        if self.layers[index].kind is Kind.LINEAR and given.dim() == 3 and given.shape[1] in self.lengths:
            self.calls.setdefault(index, []).append(given[0].detach().clone())


def find_causal(
    root: nn.Module, layers: Sequence[Found], probe: ProbeSpec, before: Calls, samples: int
) -> dict[int, bool]:
    """Of the linear layers on [B, T, C]: does the network read their sequence causally?

    `before` is what went into them in a forward on `samples` samples of the probe. For each input that is a sequence
    one more forward is made, in which its last position is another. A layer whose inputs change there and nowhere
    before has seen nothing of later positions: True, if the same holds for every layer that the change reaches; the
    first projections of an encoder see only their own position too, but what they feed mixes all (False). Layers that
    no change reaches are left out. Raises nothing: {} where a forward fails.
    """
    causal: dict[int, bool] = {}
    try:
        for changed, spec in enumerate(probe.inputs):
            if before and _is_sequence(spec):
                after = _after_a_change(root, layers, probe, changed, samples)
                reached = _compare(before, after, spec.shape[0])
                verdict = all(reached.values())
                causal.update((index, causal.get(index, False) or verdict) for index in reached)
    except Exception:  # the model's own code may raise anything; a walk never does
        return {}
    return causal


def _is_sequence(spec: InputSpec) -> bool:
    """[T] of token ids or [T, C] of numbers."""
    whole = "int" in spec.dtype
    if len(spec.shape) != (1 if whole else 2) or spec.shape[0] < SHORTEST or "mask" in (spec.name or ""):
        return False
    return not whole or spec.high is None or spec.high - spec.low > 1


def _after_a_change(root: nn.Module, layers: Sequence[Found], probe: ProbeSpec, changed: int, samples: int) -> Calls:
    """What goes into the layers when the last position of an input is another."""
    index = {layer.module: i for i, layer in enumerate(layers)}
    sequences = Sequences(layers, probe)

    def leave(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        if module in index and given is not None:
            sequences.keep(index[module], given)

    # as many as before: two calls are compared in the same shapes
    args, kwargs = probe.make(samples, device_of(root))
    _change(probe, changed, args, kwargs)
    hook = register_module_forward_hook(leave, with_kwargs=True)
    try:
        with untouched(root):
            call(root, args, kwargs)
    finally:
        hook.remove()
    return sequences.calls


def _change(probe: ProbeSpec, changed: int, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
    """Put another value at the last position of one input, in place."""
    spec = probe.inputs[changed]
    positional = [index for index, each in enumerate(probe.inputs) if each.name is None]
    tensor = args[positional.index(changed)] if spec.name is None else kwargs[spec.name]
    last = tensor[:, -1]
    if tensor.is_floating_point():
        last.add_(1)
    else:
        high = spec.low + 2 if spec.high is None else spec.high
        last.copy_((last - spec.low + 1) % (high - spec.low) + spec.low)


def _compare(before: Calls, after: Calls, length: int) -> dict[int, bool]:
    """By layer that the change reaches and whose input has that length: only at the last position, in all calls?"""
    found: dict[int, bool] = {}
    for index in before.keys() & after.keys():
        pairs = list(zip(before[index], after[index], strict=True))
        if any(one.shape != two.shape or one.shape[0] != length for one, two in pairs):
            continue
        moved = [_moved(one, two) for one, two in pairs]
        if any(bool(each.any()) for each in moved):
            found[index] = not any(bool(each[:-1].any()) for each in moved)
    return found


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """[T]: which positions differ."""
    before, after = before.double(), after.double()
    return ~((before - after).abs().amax(-1) <= TOLERANCE * before.abs().max())
