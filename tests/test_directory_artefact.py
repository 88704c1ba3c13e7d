"""Artefacts that are folders: shards and their index, whole or not at all, and what lies beside the tensors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import padconvert
from checkpoint_cases import entry, facts, manifest, same_bits, tensors_of
from directories import edited, saved, tiny
from directory_artefacts import artefact, converted, outputs, probe_of, write
from padconvert.checkpoint.folder import INDEX, SINGLE
from padconvert.checkpoint.manifest import LayerEntry
from padconvert.checkpoint.read import is_artefact, read_checkpoint
from padconvert.checkpoint.save import provenance_of, save_model
from padconvert.checkpoint.whole_file import prefix_of
from padconvert.checkpoint.whole_folder import check_folder_target
from padconvert.checkpoint.write_folder import folder_sha256, write_folder
from padconvert.errors import FileError, PadconvertError, UnsafeError, UsageError, VerificationError
from padconvert.export.directory import config_of, save_directory, source_shard_size
from padconvert.load import describe
from padconvert.rewrite import pad_layers
from padconvert.words import Granularity, Kind, Place

LINEAR: dict[str, Any] = {"ffn__level": "linear"}


def plain_entries() -> tuple[LayerEntry, ...]:
    """Twelve layers, so that natural order of names differs from that of letters; two of them are one block."""
    alone = facts(Kind.LINEAR, weight_shape=(3, 4), n_dynamic=5)
    first = facts(Kind.LINEAR, weight_shape=(6, 3), n_dynamic=5, top_k=2, group="body.0", place=Place.FIRST)
    last = facts(Kind.LINEAR, weight_shape=(3, 6), n_dynamic=5, top_k=2, group="body.0", place=Place.LAST)
    special = {0: first, 11: last}
    return tuple(entry(f"body.{n}", special.get(n, alone)) for n in range(12))


def plain_folder(path: Path, limit: int | None = 400, **options: Any) -> Path:
    entries = plain_entries()
    tensors = {name: tensor for n, each in enumerate(entries) for name, tensor in tensors_of(each, n).items()}
    tensors["head.weight"] = torch.arange(100.0)
    write_folder(path, tensors, manifest(*entries), max_shard_size=limit, **options)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- shards


def test_a_layer_and_a_block_lie_in_one_file_and_files_keep_to_the_limit(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "out")
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) >= 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    units: dict[str, set[str]] = {}
    sizes = dict.fromkeys(files, 0)
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file
                parts = name.split(".")
                unit = "body.0" if parts[:2] == ["body", "11"] else ".".join(parts[:2])
                units.setdefault(unit, set()).add(file)
                sizes[file] += opened.get_tensor(name).nbytes
    assert all(len(where) == 1 for where in units.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    single = {file for file in files if sum(1 for where in units.values() if where == {file}) == 1}
    assert all(size <= 400 or file in single for file, size in sizes.items())
    order = [units[f"body.{n}"].copy().pop() for n in (1, 2, 9, 10)]
    assert order == sorted(order)  # body.2 before body.10


def test_what_is_read_is_what_was_written_and_twice_the_same(tmp_path: Path) -> None:
    one, two = plain_folder(tmp_path / "one"), plain_folder(tmp_path / "two")
    assert content(one) == content(two)
    assert folder_sha256(one) == folder_sha256(two)
    checkpoint = read_checkpoint(one)
    assert [each.name for each in checkpoint.manifest.layers] == [f"body.{n}" for n in range(12)]
    for n, each in enumerate(plain_entries()):
        for name, tensor in tensors_of(each, n).items():
            assert same_bits(checkpoint.tensor(name), tensor)
    assert all(check.passed for check in checkpoint.verify_crc())
    assert checkpoint.header.file_size == sum((one / file).stat().st_size for file in content(one) if file != INDEX)


def test_without_a_limit_there_is_one_file_and_no_index(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "out", None)
    assert list(content(folder)) == [SINGLE]
    assert is_artefact(folder)
    assert is_artefact(folder / SINGLE)  # it is a whole artefact by itself
    assert read_checkpoint(folder).manifest == read_checkpoint(folder / SINGLE).manifest


def test_a_sharded_model_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model = converted(source)
    architecture, _ = describe(source)
    provenance = provenance_of(source_sha256=None, source_kind="module", device="cpu", seed=0, trained=True)
    out = tmp_path / "out"
    written = save_model(
        model, out, architecture=architecture, provenance=provenance, policy={}, trained=True, max_shard_size=1
    )
    assert len(content(out)) == 5  # two converted layers, the head's weight and its bias, and the index
    assert written.bytes == sum(map(len, content(out).values()))
    x = torch.randn(5, 6)
    assert torch.equal(padconvert.load(out)(x), model(x))
    assert not torch.allclose(source(x), model(x), atol=1e-4)


def damage_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    return lambda folder: edited(folder, lambda document: change(document["weight_map"]), INDEX)


def _all_to(name: str) -> Callable[[Path], object]:
    return damage_index(lambda weights: weights.update({"head.weight": name}))


def _drop_shard(folder: Path) -> None:
    (folder / read_index(folder)["head.weight"]).unlink()


def read_index(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def _swap_shards(folder: Path) -> None:
    one, two, *_ = sorted(set(read_index(folder).values()))
    (folder / one).rename(folder / "aside")
    (folder / two).rename(folder / one)
    (folder / "aside").rename(folder / two)


def _flip_in_manifest(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    assert text.count(r"\"seed\":0") == 1
    (folder / INDEX).write_text(text.replace(r"\"seed\":0", r"\"seed\":1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_all_to("../elsewhere.safetensors"), "no plain name of a file beside it"),
        (_all_to("/tmp/x.safetensors"), "no plain name of a file beside it"),
        (_all_to("..\\x.safetensors"), "no plain name of a file beside it"),
        (_all_to("config.json"), "no plain name of a file beside it"),
        (_all_to("absent.safetensors"), "absent.safetensors is missing, which model.safetensors.index.json names"),
        (_drop_shard, "is missing, which model.safetensors.index.json names"),
        (_swap_shards, "which the index does not place there"),
        (damage_index(lambda weights: weights.pop("body.1.router.bias")), "which the index does not place there"),
        (damage_index(lambda weights: weights.update(more=weights["head.weight"])), "tensor 'more' is missing"),
        (lambda folder: (folder / SINGLE).write_bytes(b""), "holds both model.safetensors and"),
        (lambda folder: (folder / INDEX).write_text("{"), "index.json: it is not valid JSON"),
        (_flip_in_manifest, "the header is damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "out")
    read_checkpoint(folder)
    damage(folder)
    with pytest.raises(FileError, match=message) as caught:
        read_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_artefact_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not an artefact of padconvert"):
        read_checkpoint(tmp_path)
    saved(tiny(), tmp_path / "plain")
    with pytest.raises(FileError, match="not an artefact of padconvert"):
        padconvert.load(tmp_path / "plain")


# ---- whole or not at all


class Stop(Exception):
    pass


def test_a_check_sees_the_whole_folder_and_can_stop_it(tmp_path: Path) -> None:
    seen: list[dict[str, bytes]] = []

    def refuse(folder: Path) -> None:
        seen.append(content(folder))
        assert read_checkpoint(folder).verify_crc()[0].passed
        raise VerificationError("no")

    with pytest.raises(VerificationError):
        plain_folder(tmp_path / "out", check=refuse)
    assert list(tmp_path.iterdir()) == []
    assert seen == [content(plain_folder(tmp_path / "out"))]


def test_an_old_artefact_is_replaced_with_force_alone(tmp_path: Path) -> None:
    out = plain_folder(tmp_path / "out")
    (out / "notes.txt").write_text("of the old one")
    before = content(out)
    with pytest.raises(UsageError, match="exists; --force replaces the whole folder"):
        plain_folder(out, None)
    assert content(out) == before
    plain_folder(out, None, force=True)
    assert list(content(out)) == [SINGLE]
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = plain_folder(tmp_path / "out")
    before = content(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FileError, match="the disk is full"):
        plain_folder(out, None, force=True)
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


KILLED = """
import os, signal, sys
from pathlib import Path
from checkpoint_cases import manifest
from padconvert.checkpoint.write_folder import write_folder
rename, at = Path.rename, int(sys.argv[2])
def counting(self, target, calls=[0]):
    if calls[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls[0] += 1
    return rename(self, target)
Path.rename = counting
write_folder(sys.argv[1], {}, manifest(), force=True)
"""


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_loses_neither_folder(at: int, tmp_path: Path) -> None:
    """Before the old one is set aside; and between that and the new one's taking its place."""
    out = plain_folder(tmp_path / "out")
    before = content(out)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(at)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == (at == 0)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UsageError, match="exists"):
        check_folder_target(out)  # the next run puts it back, and clears up
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_set_aside_stays_while_something_else_is_in_its_place(tmp_path: Path) -> None:
    out = plain_folder(tmp_path / "out")
    aside = tmp_path / f"{prefix_of(out)}00.old"
    out.rename(aside)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="something else than an artefact"):
        check_folder_target(out)
    assert is_artefact(aside)
    (out / "thesis.tex").unlink()
    plain_folder(out, None)
    assert is_artefact(aside)  # no run knows whether the new one is meant to take its place; the next one takes it away
    plain_folder(out, force=True)
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "source")
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    cases: list[tuple[Path, type[PadconvertError], str]] = [
        (tmp_path / "file", UsageError, "is a file, and a folder is to be written"),
        (tmp_path / "mine", UsageError, "something else than an artefact of padconvert"),
        (source, UsageError, "is the source itself"),
        (source / "inside", UsageError, "lie inside each other"),
        (tmp_path, UsageError, "lie inside each other"),
        (tmp_path / "absent" / "out", FileError, "does not exist"),
        (tmp_path / ("x" * 300), FileError, "File name too long"),
    ]
    for path, error, message in cases:
        with pytest.raises(error, match=message):
            plain_folder(path, force=True, source=source)
    assert content(tmp_path) == before
    plain_folder(tmp_path / "empty", source=source)
    assert is_artefact(tmp_path / "empty")


# ---- a transformers directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer, a card, a module of its own, and weights in several forms; and its artefact."""
    folder = tmp_path_factory.mktemp("bert")
    source = saved(tiny("BertForSequenceClassification"), folder / "source")
    for name in ("vocab.txt", "README.md", ".gitattributes", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(f"{name}\r\n\0".encode())
    for name in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", ".git/HEAD"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("old weights")
    edited(source, lambda config: config.update(torch_dtype="float32", house_number=7))
    model = tiny("BertForSequenceClassification")
    write(converted(model, **LINEAR), source, folder / "out")
    return folder


def test_everything_but_the_weights_is_copied(bert: Path) -> None:
    source, out = content(bert / "source"), content(bert / "out")
    copied = {"vocab.txt", ".gitattributes", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    assert set(out) == {*copied, "README.md", "README.source.md", "config.json", SINGLE}
    assert all(out[name] == source[name] for name in copied)
    assert out["README.source.md"] == source["README.md"]


def test_an_artefact_as_the_source_keeps_the_first_sources_card(bert: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(bert / "out")
    again = tmp_path / "again"
    save_directory(
        padconvert.load(bert / "out"), again, source_dir=bert / "out", architecture=checkpoint.manifest.architecture,
        provenance=checkpoint.manifest.provenance, policy={}, trained=True, probe=None,
    )  # fmt: skip
    one, two = content(bert / "out"), content(again)
    assert one.keys() == two.keys()
    assert one[SINGLE] == two[SINGLE]
    assert one["README.source.md"] == two["README.source.md"]
    assert two["README.md"].startswith(b"> **Load it only after `import padconvert.hf`**")
    assert read_checkpoint(again).manifest.crc32 == checkpoint.manifest.crc32


def test_a_head_that_was_added_is_in_the_config() -> None:
    source = {"model_type": "bert", "dtype": "float16", "torch_dtype": "float16", "architectures": ["BertModel"],
              "id2label": {"0": "a", "1": "b", "2": "c"}, "text": {"_name": 1, "width": 4}, "hidden": 3}  # fmt: skip
    described = {"model_type": "bert", "id2label": {"0": "x", "1": "y"}, "text": {"width": 5}, "problem_type": "one"}
    architecture = {"class": "BertForSequenceClassification", "config": described, "dtype": "float32"}
    assert config_of(source, architecture) == {
        "model_type": "bert", "dtype": "float32", "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "x", "1": "y"}, "text": {"_name": 1, "width": 5}, "hidden": 3, "problem_type": "one",
    }  # fmt: skip


def test_the_card_begins_with_the_import(bert: Path) -> None:
    card = (bert / "out" / "README.md").read_text()
    assert "import padconvert.hf; BertForSequenceClassification.from_pretrained(path)" in card.splitlines()[0]
    assert 'model = padconvert.load("PATH")' in card
    assert "50% dynamic, 2 of 8 experts computed" in card
    checkpoint = read_checkpoint(bert / "out")
    numbers = sum(tensor.numel() for name, tensor in checkpoint.tensors().items() if not name.endswith("mask"))
    assert f"{numbers:,} parameters" in card


def test_the_config_is_the_sources_and_holds_the_manifest(bert: Path) -> None:
    source, out = (json.loads((bert / name / "config.json").read_text()) for name in ("source", "out"))
    part = out.pop("quantization_config")
    assert out == {key: value for key, value in source.items() if key != "torch_dtype"}
    assert part["quant_method"] == "padconvert"
    assert "config" not in part["architecture"]
    with safe_open(bert / "out" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_checkpoint(bert / "out").manifest.architecture["config"] == out


def test_a_changed_manifest_is_found_and_a_changed_config_is_the_users(bert: Path, tmp_path: Path) -> None:
    out = write(converted(tiny("BertForSequenceClassification"), **LINEAR), bert / "source", tmp_path / "out")
    edited(out, lambda config: config.update(id2label={"0": "bad", "1": "good"}))
    assert read_checkpoint(out).manifest.architecture["config"]["id2label"] == {"0": "bad", "1": "good"}
    edited(out, lambda config: config["quantization_config"]["layers"][0]["facts"].update(top_k=1))
    with pytest.raises(FileError, match="the header is damaged: its checksum does not fit"):
        read_checkpoint(out)


def test_it_loads_and_the_same_input_gives_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    model = converted(tiny("BertForSequenceClassification"), **LINEAR)
    again = write(model, bert / "source", tmp_path / "out")
    assert content(again) == content(bert / "out")
    loaded, probe = padconvert.load(again), probe_of(model)
    assert len(pad_layers(loaded)) == len(pad_layers(model)) > 0
    for a, b in zip(outputs(loaded, probe), outputs(model, probe), strict=True):
        assert torch.equal(a, b)


def test_a_source_in_shards_gives_shards_as_large(tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "source", shards="10KB")
    limit = source_shard_size(source)
    assert limit is not None
    assert 5_000 < limit <= 10_000
    model = converted(tiny(), **LINEAR)
    out = write(model, source, tmp_path / "out")
    files = sorted(set(read_index(out).values()))
    assert len(files) > 2
    assert "padconvert" not in json.loads((out / INDEX).read_text())["metadata"]
    layers = {each.name for each in read_checkpoint(out).manifest.layers}
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            names = list(opened.keys())
            size = sum(opened.get_tensor(name).nbytes for name in names)
        alone = len({next((layer for layer in layers if n.startswith(f"{layer}.")), n) for n in names}) == 1
        assert size <= limit or alone
    whole = write(model, source, tmp_path / "whole", max_shard_size=1 << 30)
    assert (whole / SINGLE).is_file()
    assert state(padconvert.load(out)) == state(padconvert.load(whole)) == state(model)


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bytes(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sources_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    out = artefact(tiny().to(dtype), tmp_path, **LINEAR)
    kinds = {name: tensor.dtype for name, tensor in read_checkpoint(out).tensors().items()}
    weights = {name: kind for name, kind in kinds.items() if "router" not in name and "bitmask" not in name}
    assert set(weights.values()) == {dtype}
    assert {kind for name, kind in kinds.items() if "router" in name} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {p.dtype for n, p in padconvert.load(out).named_parameters() if "router" not in n} == {dtype}


def test_equal_experts_are_stored_once_and_the_card_says_so(tmp_path: Path) -> None:
    source = tiny()
    out = artefact(source, tmp_path, trained=False, **LINEAR)
    checkpoint = read_checkpoint(out)
    assert all(each.equal_experts for each in checkpoint.manifest.layers)
    assert all(len(t) == 1 for n, t in checkpoint.tensors().items() if n.endswith("_dynamic"))
    assert "**not fine-tuned**" in (out / "README.md").read_text()
    loaded, probe = padconvert.load(out), probe_of(source)
    for a, b in zip(outputs(loaded, probe), outputs(source, probe), strict=True):
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


def test_links_lead_no_secret_out(bert: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    hub = tmp_path / "hub"
    source = saved(tiny(), hub / "snapshots" / "abc")
    (hub / "blobs").mkdir()
    (hub / "blobs" / "123").write_text("vocabulary")
    (source / "vocab.txt").symlink_to("../../blobs/123")
    (source / "same.txt").symlink_to("vocab.txt")
    model = converted(tiny(), **LINEAR)
    out = write(model, source, tmp_path / "out")
    assert (out / "vocab.txt").read_text() == (out / "same.txt").read_text() == "vocabulary"
    assert not (out / "vocab.txt").is_symlink()
    (source / "key").symlink_to(secret)
    with pytest.raises(UnsafeError, match="is a link that leads out of the directory"):
        write(model, source, tmp_path / "out", force=True)
    (source / "key").unlink()
    (source / "folder").symlink_to(bert)
    with pytest.raises(UnsafeError, match="is a link that leads out of the directory"):
        write(model, source, tmp_path / "out", force=True)
    (source / "folder").unlink()
    (source / "loop").symlink_to("loop")
    with pytest.raises(FileError, match=r"loop: is (a link that leads back to itself|no regular file)"):
        write(model, source, tmp_path / "out", force=True)
    (source / "loop").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(FileError, match="is no regular file"):
        write(model, source, tmp_path / "out", force=True)
    assert (out / "vocab.txt").read_text() == "vocabulary"


def test_tied_tensors_are_stored_under_the_name_that_every_class_knows(tmp_path: Path) -> None:
    out = artefact(tiny("GPT2LMHeadModel"), tmp_path, **LINEAR)
    checkpoint = read_checkpoint(out)
    assert "transformer.wte.weight" in checkpoint.header.tensors
    assert checkpoint.manifest.aliases == {"lm_head.weight": "transformer.wte.weight"}
    loaded: Any = padconvert.load(out)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_channel_rows_too(tmp_path: Path) -> None:
    out = artefact(tiny(), tmp_path, **LINEAR, ffn__granularity="channel", defaults__granularity="channel")
    checkpoint = read_checkpoint(out)
    assert {each.facts.granularity for each in checkpoint.manifest.layers} == {Granularity.CHANNEL}
    kinds: dict[str, Tensor] = {n: t for n, t in checkpoint.tensors().items() if n.endswith("dynamic_index")}
    assert len(kinds) == len(checkpoint.manifest.layers)
