"""The words that several commands share, with the help that teaches them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

READING = "Reading the source"
POLICY = "What is converted"
TRAINING = "Data and training"
OUTPUT = "Output"
GATES = "Bounds: a run that does not meet one writes nothing and ends with exit code 8"

Source = Annotated[Path, typer.Argument(help="A saved model, or an artefact to go on training from.")]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="PKG.MOD:FACTORY",
        help="What builds the empty model for a file that holds only tensors. Its package is imported and run.",
        rich_help_panel=READING,
    ),
]
ArchArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="A keyword argument for --arch, read as YAML. Repeatable.", rich_help_panel=READING
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        metavar="1,3,32,32",
        help="The shape of one input, batch first. Without it the data or the model's first layer tell.",
        rich_help_panel=READING,
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PACKAGE",
        help="A package whose classes a pickled model may name. Nothing else in the file is run. Repeatable.",
        rich_help_panel=READING,
    ),
]
StateKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Of a checkpoint with several networks, the entry to take: ema, model_ema …",
        rich_help_panel=READING,
    ),
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="A column of text. Repeatable: two for pairs of sentences.",
        rich_help_panel=TRAINING,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="glue/sst2 and others, classification or regression: columns, classes and metric.",
        rich_help_panel=TRAINING,
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="The column that holds the labels.", rich_help_panel=TRAINING)
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Training steps in all.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Samples a step.", rich_help_panel=TRAINING)]
LearningRate = Annotated[float | None, typer.Option(metavar="X", help="Learning rate.", rich_help_panel=TRAINING)]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        metavar="",
        help="Also train the static and the fully dynamic model, same steps and batches: three times the work.",
        rich_help_panel=TRAINING,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Keep the training's state here; the same call resumes it.", rich_help_panel=TRAINING
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH", help="Training data: file, folder or pkg.mod:function. Repeatable.", rich_help_panel=TRAINING
    ),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH", help="Evaluation data; else a seeded part of --data is held out.", rich_help_panel=TRAINING
    ),
]
DynamicRatio = Annotated[
    float | None,
    typer.Option(
        metavar="R", help="κ: the share of a layer's weights that stay dynamic, 0 to 1.", rich_help_panel=POLICY
    ),
]
Experts = Annotated[
    int | None,
    typer.Option(metavar="K", help="How many copies of the dynamic weights, 2 or more.", rich_help_panel=POLICY),
]
Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="element|channel|neuron",
        help="Choose single weights, as the paper does, whole filters, or an FFN's whole hidden units.",
        rich_help_panel=POLICY,
    ),
]
Plan = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Carry out this saved plan instead of making one.", rich_help_panel=POLICY),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The settings to start from: paper (default), small, fast.", rich_help_panel=POLICY
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="A policy file.", rich_help_panel=POLICY)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any policy setting. Repeatable.", rich_help_panel=POLICY),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Same source, policy, data and seed: same bytes.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Default: model.pt gives model.pad.safetensors.", rich_help_panel=OUTPUT
    ),
]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="Overwrite the files that are there.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Plan and report; write no artefact.", rich_help_panel=OUTPUT)
]
PlanOut = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save the plan: every layer, its verdict and reason.", rich_help_panel=OUTPUT),
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Also write the report as one HTML file.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="One JSON document on stdout instead of the report.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="No progress bar.", rich_help_panel=OUTPUT)]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Write a larger artefact in several files, as in 2GB, 500MiB.", rich_help_panel=OUTPUT
    ),
]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="The accuracy may fall by this fraction at most, source to output, on the evaluation data.",
        rich_help_panel=GATES,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The file may have this size at most: 25MB, 1.5GiB.", rich_help_panel=GATES),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Weights, gradients and optimizer may take this much at most, as the plan estimates.",
        rich_help_panel=GATES,
    ),
]
RequireLayers = Annotated[
    int | None, typer.Option(metavar="N", help="At least this many layers are converted.", rich_help_panel=GATES)
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        metavar="",
        help="Refuse --arch, --trust and data that names a function: no code of yours.",
        rich_help_panel=GATES,
    ),
]
