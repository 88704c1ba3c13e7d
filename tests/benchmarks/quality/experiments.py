"""What is run, in this order. To add a question, add arms or tasks here; `make study` runs what has no result yet."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.arms import (
    CHANNEL,
    CHANNEL_LESS_SURE_FAST,
    DISTILLED,
    DYNAMIC,
    DYNAMIC_FAST,
    DYNAMIC_GROUPED,
    DYNAMIC_LESS_SURE,
    DYNAMIC_LESS_SURE_FAST,
    FIRST_IDEAS,
    FOURTH_IDEAS,
    LESS_SURE,
    LESS_SURE_FAST,
    PAD,
    PAD_FAST,
    PAD_FASTER,
    PAD_FOLLOWED,
    PAD_GROUPED,
    RANDOM,
    RANDOM_GROUPED,
    RANDOM_LESS_SURE_FAST,
    SECOND_IDEAS,
    SGD,
    STATIC,
    TEXT_IDEAS,
    THIRD_IDEAS,
    Arm,
)

SEEDS = (0, 1, 2)

#: of tasks whose first sources were not kept: no new arm can be paired with them
FRESH = (3, 4, 5)
EVERY = (*SEEDS, *FRESH)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Every arm on every task from the same networks. Rates are chosen on the first seed's held-out data where a task
    has several; or `rate` is taken: a first look, which proves nothing. What needs a GPU is run on one, or by name."""

    title: str
    says: str
    tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS
    rate: float | None = None
    needs_gpu: bool = False


MAIN = (STATIC, DYNAMIC, PAD, RANDOM, CHANNEL)

#: the default's routers first: its fully dynamic arm is the one that others are held against
FASTER = (
    STATIC,
    DYNAMIC_LESS_SURE_FAST,
    DYNAMIC_LESS_SURE,
    DYNAMIC_FAST,
    DYNAMIC,
    LESS_SURE,
    LESS_SURE_FAST,
    PAD,
    PAD_FASTER,
    PAD_FAST,
    RANDOM_LESS_SURE_FAST,
    CHANNEL_LESS_SURE_FAST,
)

SMALL = ("two domains (16 px", "sensors (16 px", "CIFAR-10 (16 px", "Fashion-MNIST (16 px")

#: with 120 steps the static network learns nothing of CoLA (its line is in `results/`)
TEXTS = ("SST-2 (120 steps)", "CoLA (480 steps)", "MRPC (120 steps)", "Subj (120 steps)")

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "Finished sources, long",
        "What users convert, and time to learn: the source was trained until little was left for it, then every arm "
        "half as long again. All arms at the rate 0.01, which static, fully dynamic and PAD each chose on held-out "
        "data in the shorter runs below, with two domains and with CIFAR-10.",
        tuple(f"{name}, finished, long)" for name in SMALL),
        MAIN,
    ),
    Experiment(
        "Finished sources, long, experts faster",
        "The same sources, steps and rate; dynamic entries learn at a multiple of it (`train.expert_lr_scale`).",
        ("sensors (16 px, finished, long)", "Fashion-MNIST (16 px, finished, long)"),
        FASTER,
    ),
    Experiment(
        "Finished sources, long, experts faster, other seeds",
        "The same with sources from three other seeds.",
        ("two domains (16 px, finished, long)", "CIFAR-10 (16 px, finished, long)"),
        tuple(arm for arm in FASTER if arm not in (DYNAMIC, PAD_FASTER)),
        seeds=FRESH,
    ),
    Experiment(
        "Distilled too",
        "One seed: the loss of what the source says beside the one of the labels, weighed 0.5 as by default.",
        ("sensors (16 px, finished, long)",),
        (STATIC, LESS_SURE, *DISTILLED),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "AdamW at 0.001",
        "One seed: the default rate of convolutional networks.",
        ("sensors (16 px, finished, long)", "ResNet-20 to Fashion-MNIST (16 px)"),
        (STATIC, PAD, LESS_SURE, LESS_SURE_FAST),
        seeds=(0,),
        rate=0.001,
    ),
    *(
        Experiment(
            f"SGD at {rate}",
            f"One seed, all arms at {rate}.",
            ("sensors (16 px, finished, long)",),
            SGD,
            seeds=(0,),
            rate=rate,
        )
        for rate in (0.01, 0.1)
    ),
    Experiment(
        "A published network",
        "The CIFAR ResNet-20 learns Fashion-MNIST.",
        ("ResNet-20 to Fashion-MNIST (16 px)",),
        (STATIC, PAD, LESS_SURE, LESS_SURE_FAST),
    ),
    Experiment(
        "A published network, other arms",
        "One seed: experts faster, and routers whose inputs are standardised by what they have become.",
        ("ResNet-20 to Fashion-MNIST (16 px)",),
        (STATIC, PAD_FAST, PAD_FOLLOWED),
        seeds=(0,),
    ),
    Experiment(
        "A published network, SGD",
        "One seed.",
        ("ResNet-20 to Fashion-MNIST (16 px)",),
        SGD,
        seeds=(0,),
    ),
    Experiment(
        "Finished sources",
        "The same with an eighth of the source's steps.",
        (
            *(f"{name}, finished)" for name in SMALL),
            "CIFAR-10, mobile (16 px, finished)",
            "ResNet-20 to Fashion-MNIST (16 px)",
        ),
        MAIN,
    ),
    Experiment(
        "Young sources",
        "The source has seen each picture 14 times at most: the static network itself gains points by training on. The "
        "grid of rates ended at 0.01, which was too low: in single runs at 0.03 the static network has 63.4 and PAD "
        "62.3 with one domain, 68.6 and 68.8 with two. No claim is made from these.",
        tuple(f"{name})" for name in SMALL),
        MAIN,
    ),
    Experiment(
        "Depthwise",
        "One seed, from a young source: a small network like MobileNetV2, whose depthwise filters stay static.",
        ("CIFAR-10, mobile (16 px)",),
        (STATIC, DYNAMIC_LESS_SURE, LESS_SURE, PAD),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Rates, long",
        "All at 0.03, where no grid of rates was run: whether 0.01 held them back.",
        tuple(f"{name} (16 px, finished, long)" for name in ("sensors", "Fashion-MNIST")),
        (STATIC, PAD),
        rate=0.03,
    ),
    Experiment(
        "Ideas, long",
        "One seed, from finished sources: one grouping of the samples for all layers, in place of each layer's own.",
        ("two domains (16 px, finished, long)", "CIFAR-10 (16 px, finished, long)"),
        (STATIC, DYNAMIC, PAD, DYNAMIC_GROUPED, PAD_GROUPED, RANDOM_GROUPED),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Ideas, a fourth look",
        "One seed and one rate, from a finished source, dynamic entries at four times the rate: the partition, what is "
        "converted, and how it is trained. More is in [the log](decisions/recipe.md).",
        ("sensors (16 px, finished)",),
        (STATIC, DYNAMIC_FAST, PAD_FAST, *FOURTH_IDEAS),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Ideas, a third look",
        "One seed and one rate, from finished sources: what routers read, how experts begin and how fast they learn, "
        "and an average of the weights. More is in [the log](decisions/recipe.md).",
        ("sensors (16 px, finished)",),
        (STATIC, DYNAMIC, PAD, *THIRD_IDEAS),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Ideas, a second look",
        "One seed and one rate, from finished sources. More is in [the log](decisions/recipe.md).",
        ("two domains (16 px, finished)", "CIFAR-10 (16 px, finished)"),
        (*MAIN, *SECOND_IDEAS),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Ideas, a first look",
        "One seed and one rate, from young sources: differences of under half a point are within chance.",
        ("two domains (16 px)", "CIFAR-10 (16 px)"),
        (*MAIN, *FIRST_IDEAS),
        seeds=(0,),
        rate=0.01,
    ),
    Experiment(
        "Texts",
        "MiniLM, feed-forward blocks as 8 experts with top-2, κ = 0.5; a head is trained alone first. All arms at "
        "one usual rate, 0.0001, and for an epoch of CoLA, half of MRPC, a third of SST-2 or a quarter of Subj: what "
        "two cores can do.",
        (*TEXTS, "SST-2 + CoLA + MRPC + Subj (120 steps)"),
        (STATIC, DYNAMIC, PAD, RANDOM),
    ),
    Experiment(
        "Texts at a higher rate",
        "One seed at 0.0003.",
        ("SST-2 (120 steps)",),
        (STATIC, DYNAMIC, PAD),
        seeds=(0,),
        rate=3e-4,
    ),
    Experiment(
        "Ideas, texts",
        "One seed.",
        ("SST-2 (120 steps)",),
        (STATIC, DYNAMIC, PAD, RANDOM, *TEXT_IDEAS),
        seeds=(0,),
        rate=1e-4,
    ),
    Experiment(
        "Full size",
        "Pictures of 32 × 32 pixels, and three to twelve times the steps for texts.",
        (
            *(
                f"{name}32 px, finished, long)"
                for name in ("two domains (", "sensors (", "CIFAR-10 (", "Fashion-MNIST (")
            ),
            "CIFAR-10, mobile (32 px, finished, long)",
            "ResNet-20 to Fashion-MNIST (32 px)",
            *(f"{name} (1500 steps)" for name in ("SST-2", "CoLA", "MRPC", "Subj", "SST-2 + CoLA + MRPC + Subj")),
        ),
        (STATIC, DYNAMIC, LESS_SURE, PAD, RANDOM, CHANNEL),
        needs_gpu=True,
    ),
)
