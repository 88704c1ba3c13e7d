"""The arms: what is done with the same trained network for the same steps. Ideas for a better recipe are arms too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Setting = str | int | float


@dataclass(frozen=True, slots=True)
class Arm:
    """`settings` are laid over the study's own (`BASE`), in a policy's words; a static arm trains the source."""

    name: str
    kind: Literal["static", "dynamic", "pad"]
    settings: Mapping[str, Setting] = field(default_factory=dict, hash=False)

    def but(self, name: str, **settings: Setting) -> Arm:
        """Another arm that differs from this one; `train__lr` stands for `train.lr`."""
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        return Arm(name, self.kind, {**self.settings, **changed})

    def overrides(self, base: Mapping[str, Setting], ratio: float) -> dict[str, Setting]:
        whole = {**base, **self.settings}
        if self.kind == "dynamic":
            whole["defaults.dynamic_ratio"] = 1
        else:
            whole.setdefault("defaults.dynamic_ratio", ratio)
        return whole


BASE: dict[str, Setting] = {
    "train.optimizer": "adamw",
    "train.distill_weight": 0.0,
    "train.objective": "task",
}

STATIC = Arm("static", "static")
DYNAMIC = Arm("fully dynamic", "dynamic")
PAD = Arm("PAD", "pad")
RANDOM = PAD.but("PAD, random partition", partition__score="random")
CHANNEL = PAD.but("PAD, channel", defaults__granularity="channel")
