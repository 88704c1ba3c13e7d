"""The arms: what is done with the same trained network for the same steps. Ideas for a better recipe are arms too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Setting = str | int | float
Rules = list[dict[str, str | bool]]


@dataclass(frozen=True, slots=True)
class Arm:
    """`settings` are laid over the study's own (`BASE`), in a policy's words; a static arm trains the source.

    Settings under `study.` are ideas that the product does not have (`trials.py`): `grouping`, one of
    `routings.GROUPINGS`; `reads`, one of `trials.READERS`; `noise`, a share; `average`;
    `new_value`, one of `trials.NEW_VALUES`; `standards`, whether routers' standardisation follows.
    """

    name: str
    kind: Literal["static", "dynamic", "pad"]
    settings: Mapping[str, Setting | Rules] = field(default_factory=dict, hash=False)

    def but(self, name: str, **settings: Setting | Rules) -> Arm:
        """Another arm that differs from this one; `train__lr` stands for `train.lr`."""
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        return Arm(name, self.kind, {**self.settings, **changed})

    def trial(self, name: str) -> Setting | None:
        """What it asks of an idea of the study's own."""
        found = self.settings.get(f"study.{name}")
        assert not isinstance(found, list)
        return found

    def overrides(self, base: Mapping[str, Setting], ratio: float) -> dict[str, Setting | Rules]:
        whole: dict[str, Setting | Rules] = {**base, **self.settings}
        if self.kind == "dynamic":
            whole["defaults.dynamic_ratio"] = 1
        else:
            whole.setdefault("defaults.dynamic_ratio", ratio)
        return whole


def in_policys_words(settings: Mapping[str, Setting | Rules]) -> dict[str, Setting | Rules]:
    """Without what only the study knows: settings under `study.`."""
    return {key: value for key, value in settings.items() if not key.startswith("study.")}


BASE: dict[str, Setting] = {
    "train.optimizer": "adamw",
    "train.distill_weight": 0.0,
    "train.objective": "task",
    # said, so that results keep their terms: the first is the default, the second was when the study began
    "train.expert_lr_scale": 1.0,
    "train.top_probability": 0.8,
}

STATIC = Arm("static", "static")
DYNAMIC = Arm("fully dynamic", "dynamic")
PAD = Arm("PAD", "pad")
RANDOM = PAD.but("PAD, random partition", partition__score="random")
CHANNEL = PAD.but("PAD, channel", defaults__granularity="channel")

#: dynamic entries learn faster than static ones
PAD_FASTER = PAD.but("PAD, experts' lr × 2", train__expert_lr_scale=2.0)
DYNAMIC_FAST, PAD_FAST, RANDOM_FAST, CHANNEL_FAST = (
    arm.but(f"{arm.name}, experts' lr × 4", train__expert_lr_scale=4.0) for arm in (DYNAMIC, PAD, RANDOM, CHANNEL)
)

#: what routers' inputs are standardised by follows the training
PAD_FOLLOWED = PAD.but("PAD, standardisation follows", study__standards="follow")

SGD = tuple(arm.but(f"{arm.name}, SGD", train__optimizer="sgd") for arm in (STATIC, DYNAMIC, PAD, PAD_FAST))

#: one grouping of the samples for all layers
GROUPED = {"study__grouping": "last layer"}
DYNAMIC_GROUPED = DYNAMIC.but("fully dynamic, grouped", **GROUPED)
PAD_GROUPED = PAD.but("PAD, grouped by the last layer", **GROUPED)
RANDOM_GROUPED = RANDOM.but("PAD, grouped, random partition", **GROUPED)

#: what `train.top_probability: null`, the default, stands for where all of four experts are mixed
LESS_SURE, DYNAMIC_LESS_SURE = (arm.but(f"{arm.name}, less sure", train__top_probability=0.5) for arm in (PAD, DYNAMIC))
LESS_SURE_FAST, DYNAMIC_LESS_SURE_FAST, RANDOM_LESS_SURE_FAST, CHANNEL_LESS_SURE_FAST = (
    arm.but(f"{arm.name}, less sure", train__top_probability=0.5)
    for arm in (PAD_FAST, DYNAMIC_FAST, RANDOM_FAST, CHANNEL_FAST)
)
DISTILLED = tuple(
    arm.but(f"{arm.name}, distilled too", train__objective="both", train__distill_weight=0.5)
    for arm in (STATIC, LESS_SURE)
)

#: what else was tried; the settings say what
FIRST_IDEAS = (
    DYNAMIC.but("dynamic, routers not trained", train__router_lr_scale=0.0),
    DYNAMIC.but("dynamic, routers' rate × 1", train__router_lr_scale=1.0),
    DYNAMIC.but("dynamic, surer, not trained", train__top_probability=0.95, train__router_lr_scale=0.0),
    DYNAMIC.but("dynamic, less sure, not trained", train__top_probability=0.5, train__router_lr_scale=0.0),
    DYNAMIC.but("dynamic, less sure, routers' rate × 1", train__top_probability=0.5, train__router_lr_scale=1.0),
    DYNAMIC.but("dynamic, the paper's router", defaults__router="mlp", train__router_lr_scale=1.0),
    DYNAMIC.but("dynamic, K = 8", defaults__num_experts=8),
    DYNAMIC.but("dynamic, no scales", defaults__scales="none"),
    PAD.but("PAD, routers not trained", train__router_lr_scale=0.0),
    PAD.but("PAD, fisher", partition__score="fisher"),
    PAD.but("PAD, rounds early", train__warmup=0.1, train__partitioning=0.2),
    LESS_SURE,
    PAD.but("PAD, less sure, not trained", train__top_probability=0.5, train__router_lr_scale=0.0),
    PAD.but("PAD, less sure, routers' rate × 1", train__top_probability=0.5, train__router_lr_scale=1.0),
    RANDOM.but("PAD, less sure, random partition", train__top_probability=0.5),
)
THIRD_IDEAS = (
    PAD.but("PAD, routers read deviations too", study__reads="deviations"),
    PAD.but("PAD, routers read the layer before too", study__reads="the layer before"),
    PAD.but("PAD, noisy experts", study__noise=0.1),
    PAD.but("PAD, experts' lr × 0.5", train__expert_lr_scale=0.5),
    PAD_FASTER,
    PAD_FAST,
    PAD.but("PAD, experts' lr × 8", train__expert_lr_scale=8.0),
    DYNAMIC_FAST,
    STATIC.but("static, averaged", study__average=1),
    DYNAMIC.but("dynamic, averaged", study__average=1),
    PAD.but("PAD, averaged", study__average=1),
)
#: for mixtures of experts
TEXT_IDEAS = (
    PAD_FAST,
    PAD.but("PAD, K = 4", ffn__num_experts=4),
    PAD.but("PAD, neuron", ffn__granularity="neuron"),
    PAD.but("PAD, not balanced", train__balance_weight=0.0, train__z_weight=0.0),
    PAD.but("PAD, each linear layer by itself", ffn__level="linear"),
    PAD.but("PAD, less sure", train__top_probability=0.417),  # as sure as of four
    PAD.but("PAD, routers' rate × 1", train__router_lr_scale=1.0),
    PAD.but("PAD, a soft mixture by sequence", ffn__routing="sequence", ffn__top_k=0),
)
SECOND_IDEAS = (
    LESS_SURE,
    PAD.but("PAD, nearly uniform", train__top_probability=0.35),
    PAD_GROUPED,
    PAD.but("PAD, grouped by the first layer", study__grouping="first layer"),
    PAD.but("PAD, grouped by class", study__grouping="classes"),
    PAD.but("PAD, grouped by class, less sure", study__grouping="classes", train__top_probability=0.5),
    PAD.but("PAD, routers' rate × 1", train__router_lr_scale=1.0),
)
#: with faster experts
FOURTH_IDEAS = (
    *(
        PAD_FAST.but(f"PAD × 4, {score}", partition__score=score)
        for score in ("fisher", "variance", "snip", "magnitude")
    ),
    PAD_FAST.but("PAD × 4, layers apart", partition__scope="layer"),
    PAD_FAST.but("PAD × 4, rounds early", train__warmup=0.1, train__partitioning=0.2),
    PAD_FAST.but("PAD × 4, rounds late", train__warmup=0.6, train__partitioning=0.3),
    PAD_FAST.but("PAD × 4, one round", partition__rounds=1),
    PAD_FAST.but("PAD × 4, new static values not routed", study__new_value="mean of the experts"),
    PAD_FAST.but("PAD × 4, distilled too", train__objective="both", train__distill_weight=1.0),
    PAD_FAST.but("PAD × 4, only converted layers trained", train__what="converted"),
    PAD_FAST.but("PAD × 4, stem and head too", rules=[{"role": role, "convert": True} for role in ("stem", "head")]),
    PAD_FAST.but("PAD × 4, K = 8", defaults__num_experts=8),
    PAD_FAST.but("PAD × 4, κ = 0.6", defaults__dynamic_ratio=0.6),
    PAD_FAST.but("PAD × 4, less sure, routers' rate × 1", train__top_probability=0.5, train__router_lr_scale=1.0),
    PAD_FAST.but("PAD × 4, grouped by random directions", study__grouping="random directions"),
)
