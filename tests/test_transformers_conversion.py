"""Transformers' networks as mixtures of experts: the function before training, at every level and granularity."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import padconvert
from directories import MODELS, saved, tiny
from padconvert.__main__ import main
from padconvert.errors import NothingEligibleError, PolicyError
from padconvert.finetune import resume
from padconvert.finetune.objectives import forward
from padconvert.layers.ffn import PadLinearMember
from padconvert.partition import Partitioner
from padconvert.plan import Plan
from padconvert.policy import load_policy
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.verify import distance
from padconvert.walk.probe import call, find_probe, flat_outputs
from padconvert.walk.quiet import untouched

#: blocks with one decision each
BLOCKS = {
    "BertModel": 2,
    "BertForSequenceClassification": 2,
    "RobertaForMaskedLM": 2,
    "AlbertModel": 1,  # three layers are one and the same
    "ElectraModel": 2,
    "DistilBertModel": 2,
    "GPT2LMHeadModel": 2,
    "LlamaForCausalLM": 2,
    "Qwen2ForCausalLM": 2,
    "T5ForConditionalGeneration": 4,
    "T5EncoderModel": 2,
    "ViTModel": 2,
}


def planned(model: nn.Module, **settings: object) -> Plan:
    policy = load_policy(overrides={key.replace("__", "."): value for key, value in settings.items()})
    return padconvert.plan(model, policy)


def padded_batches(model: nn.Module) -> list[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    """One sample; four with padding at their ends, for networks of text."""
    probe = find_probe(model, None)
    assert probe is not None
    calls = [probe.make(1), probe.make(4)]
    if any(spec.name == "input_ids" for spec in probe.inputs):
        args, kwargs = probe.make(4)
        mask = torch.ones_like(kwargs["input_ids"])
        for row in range(1, 4):
            mask[row, -2 * row :] = 0
        calls.append((args, {**kwargs, "attention_mask": mask}))
    return calls


def assert_same(source: nn.Module, model: nn.Module, tolerance: float) -> None:
    for args, kwargs in padded_batches(source):
        with untouched(source), untouched(model):
            found = distance(flat_outputs(call(source, args, kwargs)), flat_outputs(call(model, args, kwargs)))
        assert found[1] <= tolerance


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("level", ["ffn", "linear"])
@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_before_training_the_function_is_the_sources(name: str, level: str, granularity: str, tmp_path: Path) -> None:
    """fp64, rewritten, partitioned to κ ∈ {1, 0.5, 0.1} while the experts are equal, folded, written and read back."""
    if level == "linear" and granularity == "neuron":
        granularity = "channel"  # a unit of a single layer
    source = tiny(name).double()
    for ratio in ("1", "0.5", "0.1"):
        plan = planned(source, ffn__level=level, ffn__granularity=granularity, ffn__dynamic_ratio=ratio)
        model = copy.deepcopy(source)
        layers = rewrite_(model, plan)
        members = {layer.group for layer in layers.values() if isinstance(layer, PadLinearMember)}
        assert len(members) == (BLOCKS[name] if level == "ffn" else 0)
        assert_same(source, model, 1e-10)
        Partitioner(model, plan_without_data(plan)).round_(1, [])
        folded = padconvert.fold(model)
        assert_same(source, folded, 1e-10)
        path = tmp_path / f"{ratio}.safetensors"
        padconvert.save(folded, path)
        assert_same(source, padconvert.load(path, into=copy.deepcopy(source)), 1e-10)


def plan_without_data(plan: Plan) -> Plan:
    import dataclasses

    policy = plan.policy.model_copy(
        update={"partition": plan.policy.partition.model_copy(update={"score": "magnitude", "scope": "layer"})}
    )
    return dataclasses.replace(plan, route="data-free", policy=policy)


def test_a_ratio_of_zero_leaves_the_source() -> None:
    source = tiny("BertModel")
    plan = planned(source, ffn__dynamic_ratio="0")
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    assert not pad_layers(model)
    assert any("plain source" in note for note in plan.notes)


def test_a_mixtral_is_a_mixture_already() -> None:
    with pytest.raises(NothingEligibleError, match="already_experts"):
        planned(tiny("MixtralForCausalLM"))


def test_routing_by_sequence_is_refused_where_it_would_leak_the_future() -> None:
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        with pytest.raises(PolicyError, match="causal"):
            planned(tiny(name), ffn__routing="sequence")
    plan = planned(tiny("BertModel"), ffn__routing="sequence")
    assert {entry.choice.routing for entry in plan.converted if entry.choice} == {"sequence"}


def test_routing_by_sequence_is_refused_where_samples_are_not_first_or_positions_are_others() -> None:
    import transformers

    torch.manual_seed(0)
    xlnet = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=99, d_model=16, n_layer=2, n_head=2, d_inner=24)
    )
    funnel = transformers.FunnelModel(
        transformers.FunnelConfig(vocab_size=99, d_model=16, block_sizes=[1, 1], n_head=2, d_head=8, d_inner=24)
    )
    for model in (xlnet.eval(), funnel.eval()):  # type: ignore[no-untyped-call]
        with pytest.raises(PolicyError, match="batch, positions, channels"):
            planned(model, ffn__routing="sequence", ffn__top_k=0)


def test_the_work_directory_is_not_in_the_source(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in bert.iterdir())
    words = ["convert", bert, "-o", tmp_path / "out", *training(tmp_path), "--work-dir", bert]
    assert main([str(word) for word in words]) == 2
    assert "--work-dir" in capsys.readouterr().err
    assert sorted(path.name for path in bert.iterdir()) == before


@pytest.mark.parametrize("name", ["BertModel", "T5EncoderModel"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_routing_by_sequence_keeps_the_function_and_does_not_see_padding(name: str, top_k: int) -> None:
    source = tiny(name).double()
    plan = planned(source, ffn__routing="sequence", ffn__top_k=top_k)
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    assert_same(source, model, 1e-10)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in pad_layers(model).values():
            assert layer.weight_dynamic is not None
            layer.weight_dynamic.add_(0.2 * torch.randn_like(layer.weight_dynamic))
    ids = torch.randint(3, 99, (1, 5))
    wide = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    mask = (torch.arange(9) < 5).long()[None]
    with torch.no_grad():
        alone = model(input_ids=ids).last_hidden_state
        beside = model(input_ids=wide, attention_mask=mask).last_hidden_state[:, :5]
        inner = forward(model, {"input_ids": wide, "attention_mask": mask}).last_hidden_state[:, :5]
    torch.testing.assert_close(beside, alone, atol=1e-9, rtol=0)
    torch.testing.assert_close(inner, alone, atol=1e-9, rtol=0)


# ---- the command line --------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "good", "bad", "a", "film", "the", "very", "not", "so"]


def with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = Whitespace()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def reviews(path: Path, count: int, seed: int) -> Path:
    """Sentences that are good or bad, and say so."""
    generator = torch.Generator().manual_seed(seed)
    rows = ["sentence\tlabel"]
    for _ in range(count):
        label = int(torch.randint(2, (1,), generator=generator))
        length = int(torch.randint(2, 7, (1,), generator=generator))
        words = [WORDS[4 + int(torch.randint(6, (1,), generator=generator))] for _ in range(length)]
        words.insert(int(torch.randint(length, (1,), generator=generator)), WORDS[3 - label])
        rows.append(f"{' '.join(words)}\t{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny("BertModel"), tmp_path_factory.mktemp("source") / "bert"))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main([str(word) for word in words] + ["--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    document: dict[str, Any] = json.loads(captured.out)
    return document


def training(tmp_path: Path, *more: object) -> list[object]:
    train, held = reviews(tmp_path / "train.tsv", 160, 0), reviews(tmp_path / "dev.tsv", 60, 1)
    words: list[object] = ["--data", train, "--eval-data", held, "--task", "glue/sst2", "--steps", 40, "--lr", 5e-3]
    return [*words, "--batch-size", 16, "--set", "partition.rounds=2", *more]


@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_a_bare_encoder_learns_a_task(
    granularity: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head is added and trained, then experts; the directory that comes out loads both ways."""
    out = tmp_path / "out"
    document = run(capsys, "convert", bert, "-o", out, *training(tmp_path, "--granularity", granularity))
    assert document["route"] == "trained"
    assert document["equality"]["passed"]
    assert document["equality"]["samples"] >= 60
    assert document["metrics"]["output"]["accuracy"] > 0.9
    assert [use["layer"] for use in document["routers"]] == [
        f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)
    ]
    for use in document["routers"]:
        assert sum(use["usage"]) == pytest.approx(1, abs=1e-4)
        assert len(use["usage"]) == 8
        assert min(use["usage"]) > 0
    totals = document["totals"]
    assert totals["params_active_source"] < totals["params_active_output"] < totals["params_output"]
    assert totals["params_active_output"] < totals["params_active_fully_dynamic"] < totals["params_fully_dynamic"]
    checks = {check["name"]: check for check in run(capsys, "verify", out, "--loader", "hf")["checks"]}
    assert checks["same outputs through transformers"]["value"] == 0
    measured = run(capsys, "verify", out, "--data", tmp_path / "dev.tsv")["checks"][-1]
    assert measured["value"] == pytest.approx(document["metrics"]["output"]["accuracy"])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert (out / "tokenizer.json").read_bytes() == (bert / "tokenizer.json").read_bytes()


def test_the_same_run_gives_the_same_bytes(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = training(tmp_path, "--steps", 12)
    shas = {run(capsys, "convert", bert, "-o", tmp_path / name, *words)["output"]["sha256"] for name in "ab"}
    assert len(shas) == 1


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize(
    ("granularity", "at"), [("neuron", 6), ("element", 16), ("neuron", 35)]
)  # in the warm-up, between the rounds, in recovery
def test_a_killed_run_goes_on_to_the_same_bytes(
    granularity: str,
    at: int,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = training(tmp_path, "--granularity", granularity, "--set", "ffn.router=mlp")
    whole = run(capsys, "convert", bert, "-o", tmp_path / "whole", *words)
    words += ["--work-dir", tmp_path / "work"]
    before = resume.FileKeeper.step_done

    def killing(keeper: resume.FileKeeper, state: Any) -> None:
        if state.step == at:
            keeper.save(state)
            raise Killed
        before(keeper, state)

    monkeypatch.setattr(resume.FileKeeper, "step_done", killing)
    with pytest.raises(Killed):
        main([str(word) for word in ["convert", bert, "-o", tmp_path / "resumed", *words]])
    monkeypatch.setattr(resume.FileKeeper, "step_done", before)
    resumed = run(capsys, "convert", bert, "-o", tmp_path / "resumed", *words)
    assert resumed["output"]["sha256"] == whole["output"]["sha256"]
    assert len(resumed["history"]) == len(whole["history"])


def test_training_goes_on_from_the_directory(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = run(capsys, "convert", bert, "-o", first, *training(tmp_path, "--granularity", "neuron"))
    after = run(capsys, "convert", first, "-o", second, *training(tmp_path))
    kept = [[(layer["name"], layer["n_dynamic"]) for layer in each["layers"]] for each in (before, after)]
    assert kept[0] == kept[1]
    assert before["metrics"]["output"]["accuracy"] == pytest.approx(after["metrics"]["source"]["accuracy"])
    run(capsys, "verify", second, "--loader", "hf")


def test_both_neighbours_are_trained_from_the_same_head(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(capsys, "convert", bert, "-o", tmp_path / "out", *training(tmp_path, "--compare"))
    metrics = document["metrics"]
    assert all(metrics[each]["accuracy"] > 0.8 for each in ("static", "fully_dynamic", "output"))
    assert metrics["verdict"]


@pytest.mark.parametrize("options", [(), ("--set", "ffn.level=linear"), ("--granularity", "neuron")])
def test_without_data_a_directory_comes_out_that_computes_the_same(
    options: tuple[str, ...], bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(capsys, "convert", bert, "-o", out, *options)
    checks = run(capsys, "verify", out, "--against", bert, "--loader", "hf")["checks"]
    assert all(check["passed"] for check in checks)


def test_every_model_with_a_directory_has_its_place_here() -> None:
    assert set(MODELS) - set(BLOCKS) == {"ResNetModel", "MixtralForCausalLM"}
