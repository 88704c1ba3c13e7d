"""`ProbeSpec`: what to feed a model in order to watch one forward, as plain values that a manifest can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: how many samples a network is called on, where nobody wants more: two tell a batch dimension from a lucky broadcast
SAMPLES = 2


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input. `shape` leaves the batch out; integers are drawn from [low, high); `name` None is positional."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str  # "float32", "int64", …
    high: int | None = None
    low: int = 0

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """[batch, *shape] on the CPU. Floats are drawn in fp32, so that every precision sees the same numbers."""
        import torch

        shape, dtype = (batch, *self.shape), getattr(torch, self.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        high = self.low + 2 if self.high is None else self.high
        return torch.randint(self.low, high, shape, generator=generator).to(dtype)


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """Inputs that a model's forward accepts. `origin` says, for a person, where they come from."""

    inputs: tuple[InputSpec, ...]
    seed: int
    origin: str

    def make(
        self, batch: int, device: torch.device | str | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """(args, kwargs) for one call with `batch` samples, the same for the same seed and batch on any device."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        drawn = [(spec.name, spec.draw(batch, generator).to(device)) for spec in self.inputs]
        args = tuple(tensor for name, tensor in drawn if name is None)
        return args, {name: tensor for name, tensor in drawn if name is not None}

    def with_dtype(self, dtype: str) -> ProbeSpec:
        """The same probe for the same model in another precision; token ids stay."""
        inputs = (dataclasses.replace(spec, dtype=dtype) if "float" in spec.dtype else spec for spec in self.inputs)
        return dataclasses.replace(self, inputs=tuple(inputs))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, which `from_json` reads back."""
        inputs = [{**dataclasses.asdict(spec), "shape": list(spec.shape)} for spec in self.inputs]
        return {"inputs": inputs, "seed": self.seed, "origin": self.origin}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeSpec:
        inputs = tuple(InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in data["inputs"])
        return cls(inputs, int(data["seed"]), str(data["origin"]))


def to_json(spec: ProbeSpec) -> dict[str, Any]:
    return spec.to_json()


def from_json(data: Mapping[str, Any]) -> ProbeSpec:
    return ProbeSpec.from_json(data)
