"""Results made by hand, for the tests of the reports: numbers that are easy to recognise."""

from __future__ import annotations

from dataclasses import replace

from padconvert.results import (
    Check,
    Comparison,
    Conversion,
    Diagnosis,
    Equality,
    Extra,
    Holdings,
    Inspection,
    LayerResult,
    OutputFile,
    RouterUse,
    SourceFile,
    Totals,
    Verification,
)
from padconvert.words import Reason, Verdict

TOTALS = Totals(
    params_source=14_762,
    params_output=27_210,
    params_fully_dynamic=56_000,
    bytes_source=61_204,
    bytes_output=113_480,
    bytes_fully_dynamic=226_100,
    bytes_values=96_768,
    bytes_masks=1_728,
    bytes_router=4_240,
    bytes_header=6_600,
    tensor_bytes_source=59_048,
    tensor_bytes_output=106_880,
    tensor_bytes_fully_dynamic=219_500,
    dynamic_ratio=0.3,
)

LAYERS = (
    LayerResult(
        "0", (), "conv2d", Verdict.STATIC, Reason.STEM_STATIC, None, None, None, None, None,
        type="Conv2d", role="stem", dtype="float32", weight_shape=(16, 1, 3, 3),
    ),
    LayerResult(
        "3", ("again.3",), "conv2d", Verdict.CONVERT, Reason.POLICY_DEFAULT, "element", 4, 0.3, 3_226, 1_382,
        type="Conv2d", role="conv", dtype="float32", weight_shape=(32, 16, 3, 3),
    ),
    LayerResult(
        "6", (), "conv2d", Verdict.CONVERT, Reason.POLICY_RULE, "channel", 4, 0.5, 16, 16,
        type="Conv2d", role="conv", dtype="float32", weight_shape=(32, 32, 3, 3),
    ),
    LayerResult(
        "encoder.self_attn.out_proj", (), "linear", Verdict.INELIGIBLE, Reason.WEIGHT_READ_BY_PARENT,
        None, None, None, None, None, type="Linear", role="attention", dtype="float32", weight_shape=(32, 32),
    ),
)  # fmt: skip

TRAINED = Conversion(
    source=SourceFile("model.pt", "module", 61_204, "a" * 64),
    output=OutputFile("model.pad.safetensors", 113_480, "b" * 64),
    totals=TOTALS,
    layers=LAYERS,
    equality=Equality("forward", 4.8e-7, 2.4e-7, 1e-5, True, 256),
    metrics=Comparison(
        source={"accuracy": 0.9021, "loss": 0.3104},
        output={"accuracy": 0.9347, "loss": 0.2001},
        static={"accuracy": 0.9182, "loss": 0.2504},
        fully_dynamic={"accuracy": 0.9361, "loss": 0.1987},
        verdict="Accuracy rose by 1.65 points over the static model with the same training.",
    ),
    route="trained",
    seed=7,
    timing={"load": 0.25, "train": 40.0},
    warnings=("2 labels do not occur in the training data",),
    notes=("padconvert.yaml was used",),
    history=(
        {"step": 1, "loss": 0.8},
        {"step": 2, "loss": 0.6},
        {"step": 2, "ratio": 0.55},
        {"step": 3, "loss": 0.4},
        {"step": 3, "ratio": 0.3},
    ),
)

DATA_FREE = replace(
    TRAINED, metrics=None, route="data-free", history=(), warnings=(), notes=(), timing={},
    equality=Equality("weights", 0.0, 0.0, 1e-5, True, 0, "no inputs are known"),
)  # fmt: skip

DRY_RUN = replace(
    DATA_FREE, output=None, equality=None, plan_file="plan.json",
    totals=replace(TOTALS, bytes_output=106_880, bytes_fully_dynamic=219_500, bytes_header=0),
)  # fmt: skip


def _block(number: int, n_static: int | None = None, n_dynamic: int | None = None) -> tuple[LayerResult, ...]:
    """A gated feed-forward block, down declared before up, beside two projections of an attention."""
    where = f"layers.{number}"
    static = LayerResult(
        f"{where}.attn.q", (), "linear", Verdict.STATIC, Reason.ATTENTION_STATIC,
        type="Linear", role="attention", dtype="float32", weight_shape=(64, 64),
    )  # fmt: skip
    gate = LayerResult(
        f"{where}.mlp.gate", (), "linear", Verdict.CONVERT, Reason.POLICY_DEFAULT, "neuron", 8, 0.5,
        type="Linear", role="ffn", dtype="float32", weight_shape=(192, 64), group=f"{where}.mlp.gate", place="first",
        top_k=2, n_static=n_static, n_dynamic=n_dynamic,
    )  # fmt: skip
    up = replace(gate, name=f"{where}.mlp.up", place="peer")
    down = replace(gate, name=f"{where}.mlp.down", place="last", weight_shape=(64, 192))
    return static, replace(static, name=f"{where}.attn.v"), down, gate, up


BLOCKS = tuple(
    layer
    for number in range(6)
    for layer in _block(number, n_static=6_144 - 64 * number, n_dynamic=6_144 + 64 * number)
)
PLANNED_BLOCKS = tuple(layer for number in (0, 1, 2, 4, 5) for layer in _block(number))

MIXTURE = replace(
    TRAINED,
    source=SourceFile("bert", "transformers", 61_204, "a" * 64),
    output=OutputFile("bert.pad", 113_480, "b" * 64),
    layers=BLOCKS,
    totals=replace(
        TOTALS, params_active_source=14_762, params_active_output=17_000, params_active_fully_dynamic=20_300
    ),
    metrics=Comparison(
        source={"loss": 0.69, "accuracy": 0.6911, "matthews": -0.0207},
        output={"loss": 0.61, "accuracy": 0.7001, "matthews": 0.1234},
        static={"loss": 0.62, "accuracy": 0.7002, "matthews": 0.1101},
        fully_dynamic={"loss": 0.61, "accuracy": 0.7003, "matthews": 0.1302},
        verdict="No gain over fine-tuning the static model for the same steps that this evaluation could show.",
    ),
    routers=(
        RouterUse("layers.0.mlp.gate", (0.125,) * 8, 1.0, 0.17, 0, False),
        RouterUse("layers.1.mlp.gate", (0.3, 0.2, 0.2, 0.1, 0.1, 0.096, 0.004, 0.0), 0.8312, 0.2, 2, False),
        RouterUse("layers.2.mlp.gate", (0.97, 0.03, *(0.0,) * 6), 0.0648, 0.01, 6, True),
    ),
)

GOES_ON = replace(
    TRAINED,
    source=SourceFile("model.pad.safetensors", "artefact", 113_480, "a" * 64),
    totals=replace(TOTALS, bytes_source=113_480),
    metrics=Comparison(source={"accuracy": 0.9021}, output={"accuracy": 0.9347}),
)

INSPECTED_SOURCE = Inspection(
    path="model.pt",
    kind="module",
    bytes=61_204,
    totals=Holdings(
        4,
        2,
        14_762,
        27_210,
        56_000,
        61_204,
        106_880,
        219_500,
        dynamic_ratio=0.3,
        tensor_bytes_source=59_048,
        tensor_bytes_output=106_880,
        tensor_bytes_fully_dynamic=219_500,
    ),  # fmt: skip,
    layers=LAYERS,
    notes=("assumed an input of 1×8×8",),
)

INSPECTED_BLOCKS = replace(
    INSPECTED_SOURCE,
    path="bert",
    kind="transformers",
    layers=PLANNED_BLOCKS,
    totals=replace(
        INSPECTED_SOURCE.totals,
        params_active_source=14_762,
        params_active_output=17_000,
        params_active_fully_dynamic=20_300,
    ),
)

INSPECTED_ARTEFACT = replace(
    INSPECTED_SOURCE,
    path="model.pad.safetensors",
    kind="artefact",
    bytes=113_480,
    trained=False,
    notes=(),
    provenance={"seed": 7, "torch": "2.13.0"},
    totals=replace(INSPECTED_SOURCE.totals, bytes_source=None, bytes_output=113_480, bytes_fully_dynamic=226_100),
)

VERIFIED = Verification(
    path="model.pad.safetensors",
    checks=(
        Check("checksums", True, 12, None, "12 tensors"),
        Check("source sha256", True, "a" * 16, "a" * 16),
        Check("accuracy", True, 0.9347, None, "measured; nothing to hold it against", held=False),
        Check("probe", False, 0.25, 1e-5, "the outputs are not those of the trained model"),
    ),
    passed=False,
)

DIAGNOSED = Diagnosis(
    python="3.12.1",
    platform="Linux x86_64",
    versions={"padconvert": "0.1.0", "torch": "2.13.0", "onnx": None},
    devices=("cpu", "cuda:0 (a GPU)"),
    threads=2,
    cores=4,
    extras=(
        Extra("hf", "transformers directories", (), "pip install 'padconvert[hf]'"),
        Extra("onnx", "export to ONNX", ("onnx", "onnxscript"), "pip install 'padconvert[onnx]'"),
    ),
)
