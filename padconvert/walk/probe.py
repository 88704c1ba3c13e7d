"""Finding inputs for a model, calling it with them, and reading its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn

from padconvert.walk.guess import guesses, guesses_of_shape
from padconvert.walk.quiet import device_of, is_uninitialized, untouched
from padconvert.walk.spec import SAMPLES, InputSpec, ProbeSpec, from_json, to_json

__all__ = [
    "InputSpec",
    "ProbeSpec",
    "call",
    "find_probe",
    "flat_outputs",
    "from_json",
    "probe_of_batch",
    "to_json",
    "trials",
]

SEED = 0
# A model that no guess fits must not cost a minute.
MAX_TRIALS = 60


def find_probe(module: nn.Module, input_shape: tuple[int, ...] | None) -> ProbeSpec | None:
    """Inputs that the module's forward accepts in eval mode, or None; the module is left as it was.

    `input_shape` is as the command line takes it, batch first; whether it means numbers or token ids is tried.
    A shape that the forward refuses both ways is still returned, as numbers: the walk then says why it fails.
    Without a shape, the guesses of `walk.guess` are tried one by one; `origin` says which assumption held.
    """
    first = None
    for spec in trials(module, input_shape):
        first = first or spec
        if _accepts(module, spec):
            return spec
    return None if input_shape is None else first


def trials(module: nn.Module, input_shape: tuple[int, ...] | None) -> Iterator[ProbeSpec]:
    """Inputs to try, likeliest first; none for a module that a call would give its weights."""
    if is_uninitialized(module):
        return
    guessed = guesses(module) if input_shape is None else guesses_of_shape(module, input_shape)
    for inputs, origin in islice(guessed, MAX_TRIALS):
        yield ProbeSpec(inputs, SEED, origin)


def why_refused(module: nn.Module) -> str | None:
    """What the likeliest guess at the module's inputs meets, in a line; None where it is accepted or there is none."""
    if is_uninitialized(module):
        return None
    for inputs, origin in islice(guesses(module), 1):
        args, kwargs = ProbeSpec(inputs, SEED, origin).make(SAMPLES, device_of(module))
        try:
            with untouched(module):
                call(module, args, kwargs)
        except Exception as error:  # the model's own code may raise anything
            return f"a forward on {origin} fails: {error_line(error)}"
    return None


def error_line(error: Exception) -> str:
    """The kind of an error of the model's own code, and the first line of what it says."""
    line = next(iter(str(error).strip().splitlines()), "") or "no message"
    return f"{type(error).__name__}: {line}"


def _accepts(module: nn.Module, spec: ProbeSpec) -> bool:
    """Whether a forward runs and gives floating-point outputs."""
    args, kwargs = spec.make(SAMPLES, device_of(module))
    try:
        with untouched(module):
            return bool(flat_outputs(call(module, args, kwargs)))
    except Exception:  # whatever the model's own code raises means: not these inputs
        return False


def probe_of_batch(inputs: Tensor | Mapping[str, Tensor]) -> ProbeSpec:
    """Inputs shaped as a batch of data (batch first); integers stay within those seen, a mask keeps everything."""
    named: list[tuple[str | None, Tensor]] = (
        [(None, inputs)] if isinstance(inputs, Tensor) else [(name, tensor) for name, tensor in inputs.items()]
    )
    return ProbeSpec(tuple(_spec_like(name, tensor) for name, tensor in named), SEED, "shaped as the data's batches")


def _spec_like(name: str | None, tensor: Tensor) -> InputSpec:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    high = int(tensor.max()) + 1 if whole and tensor.numel() else None
    # A random mask may hide a whole sample, and then the model's output is NaN.
    low = 1 if high == 2 and name is not None and "mask" in name else 0
    return InputSpec(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."), high, low)


def call(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Any:
    """The module's output, whatever its type; `flat_outputs` reads it."""
    return module(*args, **kwargs)


def flat_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output in a fixed order, through mappings, sequences and dataclasses."""
    match output:
        case Tensor():
            return [output] if output.is_floating_point() else []
        case Mapping():
            parts = list(output.values())
        case list() | tuple():
            parts = list(output)
        case _ if dataclasses.is_dataclass(output) and not isinstance(output, type):
            parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
        case _:
            return []
    return [tensor for part in parts for tensor in flat_outputs(part)]
