"""Transformers directories that are refused: one line, an exit code, and nothing written."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from directories import FIRST, INDEX, WEIGHTS, audit, edited, saved, tiny
from load_attacks import Call
from padconvert.__main__ import main
from padconvert.errors import FileError, PadconvertError, UnsafeError, UsageError
from padconvert.load import detect, open_source, rebuild

Change = Callable[[Path], object]


def config(**settings: object) -> Change:
    return lambda folder: edited(folder, lambda document: document.update(settings))


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edited(folder, lambda document: change(document["weight_map"]), INDEX)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def linked(name: str) -> Change:
    def apply(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to("../elsewhere")

    return apply


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


#: as Python 3.11 and 3.12 say; later ones leave it to what opens the file
LOOP = "leads back to itself|is missing|cannot be read"


def pickled(make: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        torch.save(make(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    return apply


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


SINGLE: dict[str, tuple[Change, type[PadconvertError], str]] = {
    "unknown model": (config(model_type="nobody"), FileError, "model_type 'nobody', which transformers .* not know"),
    "no model type": (config(model_type=None, architectures=None), FileError, "no 'model_type'"),
    "unknown class": (config(architectures=["NobodyModel"]), FileError, "class is 'NobodyModel'.*no such model"),
    "no class of a model": (config(architectures=["pipeline"]), FileError, "no such model"),
    "the base of all": (config(architectures=["PreTrainedModel"]), FileError, "no such model"),
    "a name with a dot": (config(architectures=["models.bert.BertModel"]), FileError, "no such model"),
    "architectures no list": (config(architectures="BertModel"), FileError, "no list of names"),
    "another model's class": (config(architectures=["T5Model"]), FileError, "its class T5Model takes 't5'"),
    "a value of another kind": (config(hidden_size="wide"), FileError, "transformers"),
    "another width": (
        config(intermediate_size=25),
        FileError,
        r"6 tensors are of another shape .*\(encoder.layer.0.intermediate.dense.bias is \[24\], the config's \[25\]",
    ),
    "a layer more": (config(num_hidden_layers=3), FileError, "weights lack 16 of the values.*encoder.layer.2"),
    "layers without end": (config(num_hidden_layers=90_000), FileError, "hold no such network"),
    "layers past counting": (config(num_hidden_layers=10**12), FileError, "more than any network"),
    "labels past counting": (config(num_labels=10**12), FileError, "more than any network"),
    "positions without end": (config(max_position_embeddings=10**13), FileError, "hold no such network"),
    "quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        FileError,
        "quantised \\('bitsandbytes'\\).*dequantise",
    ),
    "quantised inside": (config(text_config={"quantization_config": {"quant_method": "gptq"}}), FileError, "'gptq'"),
    "no JSON": (text("config.json", "{'a': 1}"), FileError, "config.json: it is not valid JSON"),
    "a key twice": (text("config.json", '{"a": 1, "a": 2}'), FileError, "stands there twice"),
    "not a number": (text("config.json", '{"a": NaN}'), FileError, "NaN is no number"),
    "a list": (text("config.json", "[]"), FileError, "no JSON object"),
    "deep": (text("config.json", '{"a":' + "[" * 200 + "]" * 200 + "}"), FileError, "deep"),
    "very deep": (text("config.json", "[" * 100_000), FileError, "nested too deeply"),
    "vast": (text("config.json", " " * (17 << 20) + "{}"), FileError, "larger than 16 MiB"),
    "a config from elsewhere": (linked("config.json"), UnsafeError, "leads out of the directory"),
    "weights from elsewhere": (linked(WEIGHTS), UnsafeError, "leads out of the directory"),
    "a pipe for a config": (lambda folder: piped(folder / "config.json"), FileError, "is no regular file"),
    "a pipe for weights": (lambda folder: piped(folder / WEIGHTS), FileError, "is no regular file"),
    "a link to nothing": (lambda folder: dangling(folder / WEIGHTS), FileError, "is missing"),
    "a config that is a loop": (lambda folder: looped(folder / "config.json"), FileError, LOOP),
    "weights that are a loop": (lambda folder: looped(folder / WEIGHTS), FileError, LOOP),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), FileError, "holds no weights"),
    "weights cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        FileError,
        "cut short",
    ),
    "no pooler": (
        tensors(lambda held: [held.pop(f"pooler.dense.{part}") for part in ("weight", "bias")]),
        FileError,
        "lack 2 of the values of BertModel \\(pooler.dense.bias, pooler.dense.weight\\), which would stay random",
    ),
    "not a number in weights": (
        tensors(lambda held: held["pooler.dense.bias"].fill_(float("nan"))),
        FileError,
        "'pooler.dense.bias' holds NaN",
    ),
    "float8": (
        tensors(lambda held: held.update({name: t.to(torch.float8_e4m3fn) for name, t in held.items()})),
        FileError,
        "float8_e4m3fn",
    ),
    "a pickle with code": (
        pickled(lambda held: {**held, "x": Call(print, "canary")}),
        UnsafeError,
        "builtins.print",
    ),
    "a pickled module": (pickled(lambda _: nn.Linear(2, 2)), FileError, "holds a module, where"),
    "a pickled checkpoint": (pickled(lambda held: {"model": held, "step": 3}), FileError, "holds a checkpoint, where"),
}
SHARDED: dict[str, tuple[Change, type[PadconvertError], str]] = {
    "a path": (index(lambda names: names.update(a="../model.safetensors")), UnsafeError, "no plain name"),
    "a root": (index(lambda names: names.update(a="/etc/passwd")), UnsafeError, "no plain name"),
    "a drive": (index(lambda names: names.update(a="c:model.safetensors")), UnsafeError, "no plain name"),
    "a folder": (index(lambda names: names.update(a="x\\y.safetensors")), UnsafeError, "no plain name"),
    "dots": (index(lambda names: names.update(a="..")), UnsafeError, "no plain name"),
    "a zero": (index(lambda names: names.update(a="x\0.safetensors")), UnsafeError, "no plain name"),
    "no string": (index(lambda names: names.update(a=3)), UnsafeError, "'3' for a shard"),
    "a pickle as shard": (index(lambda names: names.update(a="x.bin")), FileError, "does not end on .safetensors"),
    "a shard missing": (lambda folder: (folder / FIRST).unlink(), FileError, f"{FIRST}: is missing"),
    "a shard elsewhere": (linked(FIRST), UnsafeError, "leads out of the directory"),
    "a tensor missing": (index(lambda names: names.update(a=FIRST)), FileError, f"{FIRST}: does not hold 'a'"),
    "an empty index": (index(dict.clear), FileError, "no 'weight_map'"),
    "an index of nothing": (text(INDEX, "{}"), FileError, "no 'weight_map'"),
}


def assert_refused(
    folder: Path, error: type[PadconvertError], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=message) as raised:
        open_source(folder)
    said = str(raised.value)
    assert type(raised.value) is error
    assert "\n" not in said
    assert said.startswith(str(folder))
    left = sorted(folder.parent.rglob("*"))
    for words in (["inspect", str(folder)], ["convert", str(folder), "-o", str(folder.parent / "out.safetensors")]):
        capsys.readouterr()
        assert main(words) == error.exit_code
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1] == f"error: {said}"
        assert "Traceback" not in captured.err
    assert sorted(folder.parent.rglob("*")) == left


@pytest.mark.parametrize("case", list(SINGLE))
def test_a_directory_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, error, message = SINGLE[case]
    folder = saved(tiny(), tmp_path / "m")
    change(folder)
    assert_refused(folder, error, message, capsys)
    if case != "not a number in weights":  # an audit reads no tensor's values
        audit(folder, error.exit_code, "refused" if error is UnsafeError else "unreadable", capsys)


@pytest.mark.parametrize("case", list(SHARDED))
def test_an_index_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, error, message = SHARDED[case]
    folder = saved(tiny(), tmp_path / "m", shards="2KB")
    assert (folder / FIRST).is_file(), sorted(folder.iterdir())
    change(folder)
    assert_refused(folder, error, message, capsys)
    audit(folder, error.exit_code, "refused" if error is UnsafeError else "unreadable", capsys)


@pytest.mark.parametrize("option", [["--arch", "nets:make"], ["--state-key", "ema"]])
def test_options_for_other_kinds_are_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny(), tmp_path / "m")
    assert main(["inspect", str(folder), *option]) == 2
    assert f"Leave {option[0]} away" in capsys.readouterr().err
    with pytest.raises(UsageError, match="transformers directory"):
        open_source(folder, **{option[0].removeprefix("--").replace("-", "_"): option[1]})  # type: ignore[arg-type]


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="a folder without config"):
        detect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="an adapter without its model"):
        detect(tmp_path)
    saved(tiny(), tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).rename(tmp_path / "m" / "tf_model.h5")
    with pytest.raises(FileError, match="weights of TensorFlow"):
        open_source(tmp_path / "m")


def test_without_transformers_the_line_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny(), tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FileError, match=r"needs the package transformers. Install it: pip install 'padconvert\[hf\]'"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "os.system"}, "no such model"),
        ({"class": "GPT2Model"}, "its class GPT2Model takes 'gpt2'"),
        ({"dtype": "load"}, "dtype 'load'"),
        ({"dtype": None}, "dtype 'None'"),
        ({"config": None}, "no JSON object"),
        ({"config": {}}, "another network than the tensors"),
        ({"num_hidden_layers": 3}, "16 missing"),
        ({"num_hidden_layers": 1}, "16 unexpected"),
        ({"intermediate_size": 25}, "6 of another shape"),
        ({"num_hidden_layers": 90_000}, "hold no such network"),
        ({"max_position_embeddings": 10**13}, "hold no such network"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_record_that_does_not_fit_its_tensors_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = open_source(saved(tiny(), tmp_path / "m"))
    record = source.architecture
    inside = {key: value for key, value in change.items() if key not in record}
    record = {**record, **{key: value for key, value in change.items() if key in record}}
    if inside:
        record["config"] = {**record["config"], **inside}
    with pytest.raises(FileError, match=message) as raised:
        rebuild(record, source.tensors)
    assert "\n" not in str(raised.value)
