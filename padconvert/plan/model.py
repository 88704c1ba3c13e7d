"""The plan's records: what happens to each layer, which layers are ranked together, and what it will cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from padconvert.policy import Policy
from padconvert.walk.info import LayerInfo
from padconvert.words import Granularity, Place, Reason, Routing, Verdict

Route = Literal["trained", "data-free"]


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How one layer is converted: the policy's settings, resolved for it.

    `top_k` experts are computed for a token, 0 means all of them, mixed. `group` is the first member's name where the
    layer is converted together with its feed-forward block (`level: ffn`), else "".
    """

    dynamic_ratio: Decimal
    num_experts: int
    granularity: Granularity
    scales: Literal["both", "none"]
    router: str
    routing: Routing
    top_k: int = 0
    group: str = ""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one layer.

    `rule` is the index of the policy's rule that matched first. `choice` is None unless it is converted. `n_units`
    counts entries (`element`), filters (`channel`) or hidden units of the block (`neuron`), 0 unless converted.
    `n_dynamic` counts units that stay dynamic; None where a pool decides. `n_bias_dynamic` counts bias entries; with
    `channel` and `neuron` they go with their rows, but the bias of a `neuron` block's last layer is static.
    """

    info: LayerInfo
    verdict: Verdict
    reason: Reason
    rule: int | None
    choice: LayerChoice | None
    n_units: int
    n_dynamic: int | None
    n_bias_dynamic: int | None

    @property
    def place(self) -> Place:
        """Its place in the block that it is converted with; ALONE where it is converted by itself."""
        return self.info.place if self.choice is not None and self.choice.group else Place.ALONE

    @property
    def has_router(self) -> bool:
        """Whether it is converted with a router of its own, which a block's first layer has for all of them."""
        return self.choice is not None and self.place in (Place.ALONE, Place.FIRST)


@dataclass(frozen=True, slots=True)
class Pool:
    """Layers whose units are ranked together (scope `global`): same ratio, granularity, number of experts, top-k and
    dtype. `names` has all layers of a feed-forward block of `neuron` granularity, whose units are one and the same.

    Of their `n_entries` weight entries `target` stay dynamic: exactly with `element`, within one filter with
    `channel`, within one hidden unit (its entries in all layers of the block) with `neuron`. Every layer of a pool
    keeps at least one dynamic and one static unit.
    """

    names: tuple[str, ...]
    n_entries: int
    target: int
    ratio: Decimal


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted numbers and bytes of the output, beside the source and the fully dynamic network (κ = 1, trained).

    Numbers are what is stored, buffers too; a dynamic_mask is no number. `bytes_values` are the weights and biases
    of converted layers, `bytes_masks` their bitmasks or indices; `bytes_output` is everything but the header.
    Values and masks are exact, but for pools of filters or hidden units: there values hold within one of them.

    `params_active_…` are the numbers that one token (or sample) is computed with: of a converted layer the static ones,
    `top_k` times the dynamic ones and the router; of the source, which has no choice, all: `params_source`. With
    `top_k` 0 one weight is mixed out of all experts and applied, so the dynamic ones count once; equal experts
    (data-free) are one, so they count once too.
    """

    params_source: int
    params_output: int
    params_fully_dynamic: int
    bytes_source: int
    bytes_values: int
    bytes_masks: int
    bytes_router: int
    bytes_untouched: int
    bytes_output: int
    bytes_fully_dynamic: int
    params_active_output: int
    params_active_fully_dynamic: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of a conversion. `policy` is the one in force: without data its scope and score are the only ones.

    `origins` says where each value of the policy was said, `notes` what a person should know.
    """

    layers: tuple[LayerPlan, ...]
    pools: tuple[Pool, ...]
    cost: Cost
    policy: Policy
    route: Route
    seed: int
    source_sha256: str | None
    origins: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.verdict is Verdict.CONVERT)
