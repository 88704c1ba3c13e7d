"""transformers' own from_pretrained: with the plug-in the very model, without it an error."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import padconvert
import padconvert.hf
from directories import MODELS, edited, saved, tiny
from directory_artefacts import artefact, outputs, probe_of, write
from padconvert.__main__ import main
from padconvert.checkpoint.fill import filled_layer
from padconvert.checkpoint.folder import SINGLE
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.save import save_model
from padconvert.errors import FileError, UsageError
from padconvert.load.directory_build import alone
from padconvert.results import Check
from padconvert.rewrite import pad_layers
from padconvert.verify import verify
from padconvert.verify_hf import aligned_
from padconvert.words import Place
from test_directory_artefact import content, state

LINEAR: dict[str, Any] = {"ffn__level": "linear"}
#: a Mixtral's experts are no linear layers, and the rest of it stays static
CONVERTED = sorted(MODELS.keys() - {"MixtralForCausalLM"})


def from_pretrained(folder: Path, name: str = "AutoModel", **options: Any) -> Any:
    with alone(str(folder)):
        return getattr(transformers, name).from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefact(tiny("BertForSequenceClassification"), tmp_path_factory.mktemp("bert"), **LINEAR)


@pytest.mark.parametrize("settings", [LINEAR, {"ffn__granularity": "neuron"}], ids=["linear", "neuron"])
@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_outputs_to_the_bit(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Layers by themselves, and blocks whose members share a call's routing."""
    source = tiny(name)
    out = artefact(source, tmp_path, **settings)
    ours, theirs, probe = padconvert.load(out), from_pretrained(out, name), probe_of(source)
    assert set(pad_layers(ours)) == set(pad_layers(theirs)) != set()
    assert state(ours) == state(theirs)
    aligned_(theirs)
    for a, b, c in zip(outputs(ours, probe), outputs(theirs, probe), outputs(source, probe), strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-6)
    assert not theirs.training
    assert any(parameter.requires_grad for parameter in theirs.parameters())


PLAIN = """
import sys, transformers
try:
    transformers.BertModel.from_pretrained(sys.argv[1])
except RuntimeError as error:
    sys.exit(f"refused: {error}")
"""


def test_without_the_plug_in_transformers_refuses(bert: Path) -> None:
    """In an interpreter that never heard of padconvert."""
    done = subprocess.run([sys.executable, "-c", PLAIN, str(bert)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "refused: You set `ignore_mismatched_sizes` to `False`" in done.stderr
    assert "Unknown quantization type, got padconvert" in done.stderr
    assert "ckpt: torch.Size([0])" in done.stderr


def test_a_class_with_another_head_or_none(bert: Path) -> None:
    whole, probe = padconvert.load(bert), probe_of(padconvert.load(bert))
    body, other = from_pretrained(bert), from_pretrained(bert, "AutoModelForMaskedLM")
    assert {f"bert.{name}" for name in pad_layers(body)} == set(pad_layers(whole)) == set(pad_layers(other))
    inner: Any = whole
    kwargs = probe.make(3)[1]
    with torch.no_grad():
        wanted = inner.bert(**kwargs).last_hidden_state
        assert torch.equal(body(**kwargs).last_hidden_state, wanted)
        assert torch.equal(other.bert(**kwargs).last_hidden_state, wanted)
    with pytest.raises(FileError, match=r"GPT2Model has no layer named 'bert\.encoder"):
        from_pretrained(bert, "GPT2Model", config=_config(bert, transformers.GPT2Config()))


def _config(folder: Path, config: Any) -> Any:
    config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_take_the_asked_dtype_and_nothing_else_does(dtype: torch.dtype, bert: Path) -> None:
    model = from_pretrained(bert, dtype=dtype)
    for layer in pad_layers(model).values():
        kinds = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
        assert {kinds.pop(name) for name in list(kinds) if name.startswith("router.")} == {torch.float32}
        assert {kinds.pop(name) for name in list(kinds) if name.endswith("bitmask")} == {torch.uint8}
        assert set(kinds.values()) == {dtype}
        assert layer.facts().dtype == str(dtype).removeprefix("torch.")
    wanted, found = (outputs(m, probe_of(m))[0].double() for m in (from_pretrained(bert), model))
    assert float((wanted - found).abs().max()) < (0.1 if dtype is torch.bfloat16 else 1e-5)


def test_equal_experts_are_all_there_again(tmp_path: Path) -> None:
    out = artefact(tiny(), tmp_path, trained=False, **LINEAR)
    model = from_pretrained(out)
    for layer in pad_layers(model).values():
        dynamic = layer.weight_dynamic
        assert dynamic is not None
        assert len(dynamic) == layer.num_experts
        assert torch.equal(dynamic, dynamic[:1].expand_as(dynamic))
        assert dynamic.is_contiguous()
    assert state(model) == state(padconvert.load(out))


def test_shards(tmp_path: Path) -> None:
    model = tiny()
    out = artefact(model, tmp_path / "one", **LINEAR)
    (tmp_path / "two").mkdir()
    loaded = from_pretrained(out)
    loaded.save_pretrained(tmp_path / "two", max_shard_size="10KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    assert state(padconvert.load(tmp_path / "two")) == state(loaded) == state(from_pretrained(tmp_path / "two"))


def test_it_is_an_ordinary_model(bert: Path) -> None:
    model = from_pretrained(bert, dtype=torch.bfloat16).float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    again = copy.deepcopy(model)
    probe = probe_of(model)
    assert torch.equal(outputs(again, probe)[0], outputs(model, probe)[0])


# ---- saved again


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("trained", [False, True])
def test_saved_untouched_it_is_what_it_was(trained: bool, tmp_path: Path) -> None:
    out = artefact(tiny("GPT2LMHeadModel"), tmp_path, trained=trained, **LINEAR)
    from_pretrained(out, "GPT2LMHeadModel").save_pretrained(tmp_path / "again")
    one, two = read_checkpoint(out), read_checkpoint(tmp_path / "again")
    assert two.manifest == one.manifest
    assert {name: bytes(t.reshape(-1).view(torch.uint8).numpy()) for name, t in two.tensors().items()} == {
        name: bytes(t.reshape(-1).view(torch.uint8).numpy()) for name, t in one.tensors().items()
    }
    result = verify(tmp_path / "again", loader="hf")
    assert (failed(result.checks), [check.name for check in result.checks if not check.held]) == ([], [])


def test_trained_on_it_is_honest(bert: Path, tmp_path: Path) -> None:
    """Trained, saved, loaded: the checksums are of the new tensors, and nothing is held against the old outputs."""
    model = from_pretrained(bert, "BertForSequenceClassification").train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(1, 99, (4, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    name, layer = next(iter(pad_layers(model).items()))
    assert not torch.equal(layer.state_dict()["weight_dynamic"], before[f"{name}.weight_dynamic"])
    model.save_pretrained(tmp_path / "again")
    old, new = read_checkpoint(bert).manifest, read_checkpoint(tmp_path / "again").manifest
    assert (new.trained, new.provenance.route, new.probe) == (True, "trained", None)
    assert old.probe is not None
    assert new.crc32 != old.crc32
    result = verify(tmp_path / "again", loader="hf")
    assert failed(result.checks) == []
    assert state(from_pretrained(tmp_path / "again", "BertForSequenceClassification")) == state(model)
    assert state(padconvert.load(tmp_path / "again")) == state(model)


def test_with_another_head_it_is_saved_as_that(bert: Path, tmp_path: Path) -> None:
    from_pretrained(bert, "AutoModelForMaskedLM").save_pretrained(tmp_path / "again")
    checkpoint = read_checkpoint(tmp_path / "again")
    assert checkpoint.manifest.architecture["class"] == "BertForMaskedLM"
    assert type(padconvert.load(tmp_path / "again")).__name__ == "BertForMaskedLM"
    assert failed(verify(tmp_path / "again", loader="hf").checks) == []


def test_cast_and_saved_it_is_of_that_dtype(bert: Path, tmp_path: Path) -> None:
    model = from_pretrained(bert, "BertForSequenceClassification", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    checkpoint = read_checkpoint(tmp_path / "again")
    assert {entry.facts.dtype for entry in checkpoint.manifest.layers} == {"bfloat16"}
    assert checkpoint.manifest.architecture["dtype"] == "bfloat16"
    assert state(padconvert.load(tmp_path / "again")) == state(model)


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [("BertForSequenceClassification", "BertModel"), ("BertModel", "BertForSequenceClassification")],
)
def test_blocks_are_saved_under_another_prefix(stored: str, loaded: str, tmp_path: Path) -> None:
    """A head is added, or taken away, and it is trained on; the blocks' names change with their layers'."""
    model = from_pretrained(artefact(tiny(stored), tmp_path), loaded).train()
    ids = torch.randint(1, 99, (4, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids)[0].square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.save_pretrained(tmp_path / "again")
    layers = read_checkpoint(tmp_path / "again").manifest.layers
    assert {entry.facts.group for entry in layers} == {e.name for e in layers if e.facts.place is Place.FIRST} != set()
    assert {entry.name.startswith("bert.") for entry in layers} == {loaded != "BertModel"}
    assert failed(verify(tmp_path / "again", loader="hf").checks) == []
    again, ours = from_pretrained(tmp_path / "again", loaded), padconvert.load(tmp_path / "again")
    assert state(again) == state(ours) == state(model)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids)[0]
        assert torch.equal(again(input_ids=ids)[0], wanted)
        assert torch.equal(ours(input_ids=ids)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_routers_that_were_cast_are_saved_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = from_pretrained(artefact(tiny(), tmp_path)).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "again")
    checkpoint = read_checkpoint(tmp_path / "again")
    assert {entry.facts.dtype for entry in checkpoint.manifest.layers} == {str(dtype).removeprefix("torch.")}
    kinds = {name: t.dtype for name, t in checkpoint.tensors().items() if t.is_floating_point()}
    routers = {name for name in kinds if ".router." in name}
    assert {kinds[name] for name in routers} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - routers} == {dtype}
    again = from_pretrained(tmp_path / "again")
    assert state(again) == state(padconvert.load(tmp_path / "again")) == state(model)
    assert failed(verify(tmp_path / "again", loader="hf").checks) == []


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_what_padconvert_loaded_is_saved_as_well(name: str, trained: bool, tmp_path: Path) -> None:
    out = artefact(tiny(name), tmp_path, trained=trained)
    model: Any = padconvert.load(out)
    model.save_pretrained(tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").manifest == read_checkpoint(out).manifest
    assert (tmp_path / "again" / SINGLE).read_bytes() == (out / SINGLE).read_bytes()
    assert (
        state(from_pretrained(tmp_path / "again", name)) == state(padconvert.load(tmp_path / "again")) == state(model)
    )
    result = verify(tmp_path / "again", loader="hf")
    assert (failed(result.checks), [check.name for check in result.checks if not check.held]) == ([], [])


def test_a_file_and_a_module_of_ones_own_are_saved_as_well(bert: Path, tmp_path: Path) -> None:
    """A single file has no placeholders; it is not another model for that."""
    name = "BertForSequenceClassification"
    checkpoint = read_checkpoint(bert)
    given = checkpoint.manifest
    probe = probe_of(padconvert.load(bert))
    save_model(
        padconvert.load(bert), tmp_path / "file.st", architecture=given.architecture, provenance=given.provenance,
        policy={}, trained=True, probe=probe,
    )  # fmt: skip
    for n, model in enumerate((padconvert.load(tmp_path / "file.st"), padconvert.load(bert, into=tiny(name)))):
        mine: Any = model
        mine.save_pretrained(tmp_path / f"{n}")
        again = read_checkpoint(tmp_path / f"{n}").manifest
        assert (again.crc32, again.probe) == (given.crc32, given.probe)
        assert state(from_pretrained(tmp_path / f"{n}", name)) == state(mine)


def test_it_is_saved_as_a_file_as_well(bert: Path, tmp_path: Path) -> None:
    model = padconvert.load(bert)
    padconvert.save(model, tmp_path / "file.st")
    assert state(padconvert.load(tmp_path / "file.st")) == state(model)


def test_without_converted_layers_it_is_a_plain_directory(tmp_path: Path) -> None:
    source = tiny("BertForSequenceClassification")
    out = write(source, saved(source, tmp_path / "source"), tmp_path / "out", trained=False)
    checks = {check.name: check for check in verify(out, loader="hf").checks}
    assert failed(tuple(checks.values())) == []
    without = checks["fails without padconvert.hf"]
    assert not without.held
    assert "no layer is converted" in without.detail
    done = subprocess.run([sys.executable, "-c", PLAIN, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Unknown quantization type, got padconvert" in done.stderr
    assert state(from_pretrained(out, "BertForSequenceClassification")) == state(source)
    card = (out / "README.md").read_text()
    assert "**No layer is converted**" in card.splitlines()[0]
    assert "does not load" not in card
    assert "experts" not in card


def test_what_cannot_be_loaded_again_leaves_no_config_behind(bert: Path, tmp_path: Path) -> None:
    model = from_pretrained(bert)
    layer = next(iter(pad_layers(model).values()))
    layer.register_buffer("strange", torch.zeros(3))
    with pytest.raises(FileError, match=r"tensor '.*\.strange' is unexpected in the dynamic layer"):
        model.save_pretrained(tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []


def test_an_unfolded_model_is_not_saved(bert: Path, tmp_path: Path) -> None:
    model = from_pretrained(bert)
    next(iter(pad_layers(model).values())).add_scales_()
    with pytest.raises(UsageError, match=r"is not folded, and only folded models are stored: padconvert\.fold"):
        model.save_pretrained(tmp_path / "again")


# ---- what is refused


def test_a_spread_model_is_refused(bert: Path) -> None:
    """Asked directly, for transformers hands a device_map on only where accelerate is installed."""
    part = json.loads((bert / "config.json").read_text())["quantization_config"]
    quantizer = padconvert.hf.PadConvertQuantizer(padconvert.hf.PadConvertConfig(**part))
    spread: list[Any] = ["auto", {"": "cpu", "encoder": "disk"}]
    whole: list[Any] = [None, {"": torch.device("cpu")}]
    for given in spread:
        with pytest.raises(UsageError, match="loaded whole, onto one device"):
            quantizer.validate_environment(device_map=given)
    for given in whole:
        quantizer.validate_environment(device_map=given)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        padconvert.hf.PadConvertQuantizer(padconvert.hf.PadConvertConfig(**part), pre_quantized=False)


@pytest.fixture
def damaged(bert: Path, tmp_path: Path) -> Path:
    for name, data in content(bert).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_files_that_are_not_the_manifests_are_refused(damaged: Path) -> None:
    edited(damaged, lambda config: config["quantization_config"]["layers"][0]["facts"].update(num_experts=7))
    with pytest.raises(FileError, match="the header is damaged: its checksum does not fit"):
        from_pretrained(damaged)
    edited(damaged, lambda config: config["quantization_config"].update(format=2))
    with pytest.raises(FileError, match="checkpoint format 2; a newer padconvert is needed"):
        from_pretrained(damaged)


def test_a_bitmask_with_other_bits_is_refused(damaged: Path) -> None:
    checkpoint = read_checkpoint(damaged)
    name = next(name for name in checkpoint.header.tensors if name.endswith("weight_dynamic"))
    slot = checkpoint.header.tensors[name.replace("weight_dynamic", "dynamic_bitmask")]
    data = bytearray((damaged / SINGLE).read_bytes())
    data[checkpoint.header.data_start + slot.begin] ^= 1
    (damaged / SINGLE).write_bytes(data)
    with pytest.raises(FileError, match="bits are set, the manifest says"):
        from_pretrained(damaged)


# ---- verify --loader hf


def test_verify_through_transformers(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bert), "--loader", "hf"]) == 0
    said = capsys.readouterr().out
    for name in ("loads through transformers", "same outputs through transformers", "fails without padconvert.hf"):
        assert f"✓ {name}" in said
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    made = copy.deepcopy(net)
    padconvert.rewrite_(made, padconvert.plan(net, inputs=torch.randn(2, 4)))
    padconvert.save(made, tmp_path / "file.st")
    assert main(["verify", str(tmp_path / "file.st"), "--loader", "hf"]) == 2
    assert "is no transformers directory" in capsys.readouterr().err
    assert main(["verify", str(bert), "--loader", "gguf"]) == 2


def test_verify_sees_what_would_load_at_random(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same artefact as it would be without the empty tensors: transformers loads it, and only warns."""
    model = from_pretrained(damaged, "BertForSequenceClassification")
    monkeypatch.setattr("padconvert.checkpoint.save.placeholders", lambda _: {})
    model.save_pretrained(damaged)
    assert failed(verify(damaged, loader="hf").checks) == ["fails without padconvert.hf"]


@pytest.mark.parametrize(
    "architectures", [["BertForMaskedLM"], [], None, ["BertForSequenceClassification", "BertModel"]]
)
def test_verify_sees_another_class_in_the_config(architectures: list[str] | None, damaged: Path) -> None:
    """transformers' pipelines and servers go by it, and would put a random head on top."""
    edited(damaged, lambda config: config.update(architectures=architectures))
    assert failed(verify(damaged, loader="hf").checks) == ["class in config.json"]


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_verify_sees_another_depth_in_the_config(change: dict[str, int], damaged: Path) -> None:
    assert json.loads((damaged / "config.json").read_text())["num_hidden_layers"] == 2
    edited(damaged, lambda config: config.update(change))
    with pytest.raises(FileError, match="describes another network than the tensors are of"):
        verify(damaged, loader="hf")


def test_verify_sees_another_model_through_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def off(*args: Any) -> Any:
        layer: Any = filled_layer(*args)
        with torch.no_grad():
            layer.router.bias += torch.arange(len(layer.router.bias))
        return layer

    monkeypatch.setattr(padconvert.hf, "filled_layer", off)
    assert failed(verify(bert, loader="hf").checks) == ["same outputs through transformers"]


def test_blocks_routed_by_the_sequence_do_not_see_padding(tmp_path: Path) -> None:
    source = tiny()
    out = artefact(source, tmp_path, ffn__routing="sequence")
    ours, theirs = padconvert.load(out), from_pretrained(out)
    assert {layer.facts().place for layer in pad_layers(theirs).values()} == {Place.FIRST, Place.LAST}
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        a = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        b = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = theirs(input_ids=ids[1:, :5]).last_hidden_state
    assert torch.equal(a, b)
    assert torch.allclose(b[1:, :5], alone, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").manifest == read_checkpoint(out).manifest
