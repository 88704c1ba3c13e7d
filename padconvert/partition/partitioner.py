"""Iterative Mode Partition (PAD-Net): rounds that score the dynamic units and turn the lowest static.

Call it from any training loop: after a warm-up, `round_(t, losses)` for t = 1..rounds, training in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padconvert.errors import UsageError, VerificationError
from padconvert.layers.pad import Moved, PadLayer
from padconvert.partition.evidence import Loss, Part, cuts_of, measure
from padconvert.partition.ranking import keep_across_layers, keep_in_layer
from padconvert.partition.schedule import count_at, ratio_at
from padconvert.partition.scores import Need, score_named
from padconvert.plan import LayerPlan, Plan, Pool
from padconvert.words import Granularity, Verdict


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did: the ratio it went to, the dynamic weight entries left, and how parameters moved."""

    t: int
    ratio: float
    n_dynamic: int
    moved: tuple[Moved, ...]


class Partitioner:
    """Takes the converted layers of `model` from fully dynamic to the plan's ratios in `rounds` rounds."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.score_name = "magnitude" if plan.route == "data-free" else plan.policy.partition.score
        self.score = score_named(self.score_name)
        self.rounds = 1 if plan.route == "data-free" else plan.policy.partition.rounds
        self.schedule = plan.policy.partition.schedule
        self.seed = plan.seed
        self.layers: dict[str, PadLayer] = {}
        self._plans: dict[str, LayerPlan] = {}
        for entry in plan.layers:
            if entry.verdict is Verdict.CONVERT:
                layer = model.get_submodule(entry.info.name)
                assert isinstance(layer, PadLayer), f"rewrite_ has not replaced {entry.info.name}"
                self.layers[entry.info.name] = layer
                self._plans[entry.info.name] = entry
        self._pools = plan.pools
        #: rounds that are done; a resumed run sets it
        self.done = 0

    @property
    def needs(self) -> Need:
        """What the score is computed from. For `sample_gradients` every loss must be of a single sample."""
        return self.score.NEEDS

    def round_(self, t: int, losses: Sequence[Loss]) -> Round:
        """Round t of 1..rounds: score on `losses` (micro-batches in eval mode), then turn the lowest units static.

        Rounds come in order, each once. Raises UsageError for another `t`, or without losses where the score needs
        them; VerificationError where a score is not finite, or all are zero.
        """
        if t != self.done + 1 or t > self.rounds:
            due = f"round {self.done + 1} of {self.rounds} is due" if self.done < self.rounds else "all rounds are done"
            raise UsageError(f"round_({t}): {due}.")
        if not losses and self.needs is not Need.WEIGHTS:
            raise UsageError(f"round_({t}): the score '{self.score_name}' needs losses of at least one micro-batch.")
        generator = torch.Generator().manual_seed(self.seed * 1000 + t)
        scores, mean_routing = measure(self.model, self.layers, self.score, losses, generator)
        if self.needs is not Need.WEIGHTS and scores and not any(bool(value.any()) for value in scores.values()):
            raise VerificationError(self._nothing_to_rank())
        kept = self._kept(t, scores)
        cuts = cuts_of(self.layers)
        moved: list[Moved] = []
        for key, keep in kept.items():
            for name, part in cuts[key]:
                moved += self._turn_static(self.layers[name], part, keep, mean_routing[name])
        self.done = t
        return Round(t, self._ratio(t), sum(self._dynamic_entries(name) for name in self.layers), tuple(moved))

    def _nothing_to_rank(self) -> str:
        if all(layer.experts_are_equal for layer in self.layers.values()):
            return (
                "All scores are zero: the experts are still equal. Train longer before the first round "
                "(train.warmup, train.steps), or use the score 'magnitude'."
            )
        return (
            "All scores are zero: the experts differ, but the loss no longer depends on them. The training has broken "
            "the network, for example by a rate that is too high: lower train.lr or train.expert_lr_scale, and see "
            "whether the source itself learns at that rate."
        )

    # ---- which units stay --------------------------------------------------------------------------------------

    def _kept(self, t: int, scores: Mapping[Part, Tensor]) -> dict[Part, Tensor]:
        """For every part a bool over its still-dynamic units."""
        kept: dict[Part, Tensor] = {}
        pooled = {name for pool in self._pools for name in pool.names}
        for pool in self._pools:
            kept |= self._kept_in_pool(t, pool, scores)
        for (name, part), score in scores.items():
            if part == "weight" and name in pooled:
                continue
            total = self.layers[name].view(part).units
            kept[name, part] = keep_in_layer(score, self._count(t, name, total))
        return kept

    def _kept_in_pool(self, t: int, pool: Pool, scores: Mapping[Part, Tensor]) -> dict[Part, Tensor]:
        """One ranking over the pool's layers; hidden units of a `neuron` block count with all their entries."""
        sizes: dict[str, int] = {}
        for name in pool.names:
            layer = self.layers[name]
            owner = layer.group if layer.granularity is Granularity.NEURON else name
            sizes[owner] = sizes.get(owner, 0) + layer.view("weight").size
        masks = keep_across_layers(
            [scores[name, "weight"] for name in sizes],
            list(sizes.values()),
            [self.layers[name].view("weight").units for name in sizes],
            count_at(pool.ratio, self.rounds, t, self.schedule, pool.n_entries),
        )
        return {(name, "weight"): mask for name, mask in zip(sizes, masks, strict=True)}

    def _count(self, t: int, name: str, total: int) -> int:
        choice = self._plans[name].choice
        assert choice is not None
        return count_at(choice.dynamic_ratio, self.rounds, t, self.schedule, total)

    def _ratio(self, t: int) -> float:
        """The share of all converted weight entries that round t goes to."""
        totals = {name: layer.view("weight") for name, layer in self.layers.items()}
        entries = {name: view.units * view.size for name, view in totals.items()}
        wanted = 0.0
        for name, n in entries.items():
            choice = self._plans[name].choice
            assert choice is not None
            wanted += n * float(ratio_at(choice.dynamic_ratio, self.rounds, t, self.schedule))
        return wanted / max(sum(entries.values()), 1)

    def _dynamic_entries(self, name: str) -> int:
        layer = self.layers[name]
        return len(layer.units("weight").dynamic) * layer.view("weight").size

    # ---- turning static ----------------------------------------------------------------------------------------

    def _turn_static(self, layer: PadLayer, part: str, keep: Tensor, mean_routing_K: Tensor) -> list[Moved]:
        """`keep` is over the still-dynamic units."""
        if bool(keep.all()):
            return []
        units = layer.units(part)
        mask = torch.zeros(len(units.dynamic) + len(units.static), dtype=torch.bool, device=units.dynamic.device)
        mask[units.dynamic[keep.to(units.dynamic.device)]] = True
        return layer.partition_(part, mask, mean_routing_K)
