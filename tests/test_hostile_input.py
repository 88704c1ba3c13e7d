"""Files and words made to deceive, to block or to exhaust: each is one clear line, the same from audit and convert."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from padconvert.__main__ import main
from padconvert.allow import NO_MODELS, may_be_trusted
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.manifest import KEY, manifest_from_json, metadata_of
from padconvert.errors import FileError, UsageError, printable
from padconvert.load.artefact import load


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()  # fmt: skip


def ran(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def both(path: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """Exit code and error line of the audit and of convert."""
    target = "out" if Path(path).is_dir() else "out.st"
    runs = (["inspect", path, "--audit"], ["convert", path, "-o", target, "--force", "-q"])
    results = [ran(*words, capsys=capsys) for words in runs]
    assert all(err.count("\n") <= 1 for _, _, err in results)
    return [(code, err) for code, _, err in results]


@pytest.fixture
def artefact(in_tmp: Path) -> Path:
    torch.save(net(), "model.pt")
    assert main(["convert", "model.pt", "-o", "model.st", "-q"]) == 0
    return in_tmp / "model.st"


def changed(path: Path, **parts: Any) -> None:
    """The artefact with other parts of its manifest, and checksums that agree."""
    header = read_header(path)
    body = path.read_bytes()[header.data_start :]
    specs = {name: (slot.dtype, slot.shape) for name, slot in header.tensors.items()}
    manifest = replace(manifest_from_json(header.metadata[KEY]), **parts)
    encoded, _ = encode_header(specs, metadata_of(manifest, specs))
    path.write_bytes(encoded + body)


# ---- factories


def test_everything_that_is_installed_along_is_no_package_of_models() -> None:
    """The closure of what padconvert requires, as it is installed here."""
    tops: dict[str, set[str]] = {}
    for top, owners in importlib.metadata.packages_distributions().items():
        for owner in owners:
            tops.setdefault(re.sub(r"[-_.]+", "-", owner).lower(), set()).add(top)
    seen: set[str] = set()
    left = ["padconvert"]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen or name not in tops:
            continue
        seen.add(name)
        lines = importlib.metadata.requires(name) or []
        needed = [line for line in lines if "extra ==" not in line or (name == "padconvert" and "dev" not in line)]
        left += [re.match(r"[\w.-]+", line)[0] for line in needed]  # type: ignore[index]
    found = {top for name in seen for top in tops[name] if top.isidentifier()}
    assert {"torch", "numpy", "typer", "rich", "safetensors", "yaml", "pydantic", "padconvert"} <= found
    assert sorted(found - NO_MODELS) == []
    assert {"pip", "setuptools", "os", "__main__"} <= NO_MODELS
    assert all(may_be_trusted(name) for name in ("mynets", "torchvision.models", "timm", "nets:make"))
    assert not any(may_be_trusted(name) for name in ("padconvert", "mynets.__main__:main", "a\nb", "os:x", ""))


REFUSED = ["padconvert.__main__:main", "padconvert:convert", "pip.__main__:main", "transformers:pipeline", "yaml:load"]


@pytest.mark.parametrize("ref", [*REFUSED, "mynets.__main__:main"])
def test_no_flag_lets_an_artefact_call_what_is_installed(
    ref: str, artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(artefact, architecture={"kind": "factory", "ref": ref, "args": {"arguments": ["policy", "init", "canary"]}})
    code, out, err = ran("inspect", "model.st", "--audit", "--json", capsys=capsys)
    assert (code, json.loads(out)["verdict"], json.loads(out)["trust"]) == (6, "refused", [])
    assert "--trust " + ref.split(".")[0] not in err
    top = ref.partition(":")[0]
    assert ran("verify", "model.st", "--trust", top, capsys=capsys)[0] == 2
    with pytest.raises(UsageError, match="not a package of models"):
        load(artefact, trust=(top,))
    assert not Path("canary").exists()


NETS = """
import functools, os, sys
from torch import nn

def make():
    return nn.Linear(2, 2)

def leaves():
    sys.exit(0)

def breaks():
    raise GeneratorExit("two\\nlines")

def number():
    return 5

class Holder:
    inner = os

part = functools.partial(nn.Linear, 2, 2)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os.system", "comes from another package"), ("functools.partial", "comes from another package"),
        ("nn.Linear", "comes from another package"), ("Holder.inner.system", "comes from another package"),
        ("leaves", "raised SystemExit"), ("breaks", "raised GeneratorExit"), ("number", "not a torch.nn.Module"),
    ],
)  # fmt: skip
def test_a_trusted_package_lends_nothing_that_it_imported(
    name: str, said: str, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (artefact.parent / "lendnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(artefact.parent))
    changed(artefact, architecture={"kind": "factory", "ref": f"lendnets:{name}", "args": {}})
    with pytest.raises(UsageError, match=said) as raised:
        load(artefact, trust=("lendnets",))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["make", "part"])
def test_what_it_defines_is_called(name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padconvert.load import open_source

    (in_tmp / "lendnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(in_tmp))
    torch.save(nn.Linear(2, 2).state_dict(), "state.pt")
    assert isinstance(open_source("state.pt", arch=f"lendnets:{name}").module, nn.Linear)


# ---- names out of files

RAW = "a\x1b[31mRED\x1b[0m\r\n\u202e safe: nothing\x9b in it runs\x7f\u2028"


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("a b\u00a0é→") == "a b\u00a0é→"
    assert printable(RAW) == r"a\u001b[31mRED\u001b[0m\r\n\u202e safe: nothing\u009b in it runs\u007f\u2028"
    assert printable("\U000e0041") == r"\udb40\udc41"
    assert json.loads(f'"{printable(RAW)}"') == RAW
    assert str(FileError(RAW)).isprintable()
    assert str(UsageError("two\n  lines")) == "two\n  lines"


def test_names_of_a_pickle_reach_no_terminal_raw(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    from load_attacks import write

    write(in_tmp / "model.pt", {"data.pkl": b"\x80\x04" + text("os\nsystem") + text(RAW) + b"\x93)R."})
    for words in (["inspect", "model.pt", "--audit"], ["convert", "model.pt"], ["inspect", "model.pt", "--json"]):
        code, out, err = ran(*words, capsys=capsys)
        assert code == 6
        assert (out + err).replace("\n", "").isprintable()
        assert err.count("\n") == 1
        assert "--trust" not in out + err
        assert r"\u001b[31mRED" in out + err
    names = json.loads(ran("inspect", "model.pt", "--audit", "--json", capsys=capsys)[1])["names"]
    assert names[0]["name"] == f"os\nsystem.{RAW}"


def test_keys_of_a_policy_and_words_of_a_manifest_reach_no_terminal_raw(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.yaml").write_text('version: 1\n"\\e[31mx\\n\\u202e": 1\n')
    code, out, err = ran("policy", "check", "p.yaml", capsys=capsys)
    assert code == 3
    assert (out + err).replace("\n", "").isprintable()
    assert err.count("\n") == 1
    provenance = manifest_from_json(read_header(artefact).metadata[KEY]).provenance
    changed(artefact, provenance=replace(provenance, source_kind=RAW))
    code, out, err = ran("inspect", "model.st", capsys=capsys)
    assert (out + err).replace("\n", "").isprintable()
    assert r"\u001b[31mRED" in out + err


# ---- special files


def special(kind: str) -> str:
    match kind:
        case "a link to /dev/zero":
            os.symlink("/dev/zero", "model.pt")
        case "a pipe":
            os.mkfifo("model.pt")
        case "a link to itself":
            os.symlink("model.pt", "model.pt")
        case "a folder of pipes":
            os.mkdir("model.pt")
            for name in ("config.json", "model.safetensors", "x.py"):
                os.mkfifo(f"model.pt/{name}")
    return "model.pt"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a link to /dev/zero", "a pipe", "a link to itself", "a folder of pipes"])
def test_a_special_file_is_refused_unread(kind: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = special(kind)
    begun = time.monotonic()
    for words in (["inspect", path, "--audit"], ["inspect", path], ["convert", path, "-o", "out"], ["verify", path]):
        code, _, err = ran(*words, capsys=capsys)
        assert (code, err.count("\n")) == (4, 1)
        assert str(in_tmp) not in err
    assert time.monotonic() - begun < 5


# ---- attributes that contradict the tensors


def told(layer: int, **attributes: Any) -> nn.Sequential:
    made = net()
    made[layer].__dict__.update(attributes)
    return made


LIES: dict[str, tuple[int, dict[str, Any], str]] = {
    "in_channels": (0, {"in_channels": 10**6}, "in_channels is 1000000, but its weight is"),
    "out_channels": (2, {"out_channels": 9}, "out_channels is 9, but its weight is"),
    "padding": (0, {"padding": (1500, 1500)}, "reaches far past its kernel"),
    "padding in words": (0, {"padding": "../../etc"}, "padding is '../../etc'"),
    "padding of another mode": (
        0, {"padding_mode": "circular", "_reversed_padding_repeated_twice": [10**9] * 4}, "would be padded by",
    ),
    "padding by no list": (0, {"_reversed_padding_repeated_twice": True}, "would be padded by True"),
    "stride": (0, {"stride": (-1, 1)}, "stride is"), "no stride": (0, {"stride": (0, 0)}, "stride is"),
    "groups": (0, {"groups": 0}, "groups is 0"), "dilation": (0, {"dilation": (10**9, 10**9)}, "dilation is"),
    "kernel": (0, {"kernel_size": (5, 5)}, "kernel_size is"), "a mode": (0, {"padding_mode": "x"}, "padding_mode is"),
    "in_features": (5, {"in_features": 10**12}, "in_features is"), "truth": (5, {"out_features": True}, "out_features"),
    "a pool": (3, {"output_size": (10**5, 10**5)}, "output_size is"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LIES))
def test_a_layer_that_lies_about_its_size_is_refused_by_name(
    name: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, attributes, said = LIES[name]
    torch.save(told(layer, **attributes), "model.pt")
    for code, err in both("model.pt", capsys):
        assert code == 4
        assert f"layer '{layer}' is a {type(net()[layer]).__name__} whose {said}"[: len(f"layer '{layer}'")] in err
        assert said in err
    assert not (in_tmp / "out.st").exists()


@pytest.mark.usefixtures("in_tmp")
def test_a_size_that_is_a_layer_which_cannot_be_printed_is_named_by_its_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = net()
    made[0].__dict__["kernel_size"] = made[0]  # printing it never ends
    torch.save(made, "model.pt")
    for code, err in both("model.pt", capsys):
        assert code == 4
        assert "kernel_size is a Conv2d, which no network has" in err


@pytest.mark.parametrize("table", ["_buffers", "_parameters", "_modules"])
@pytest.mark.usefixtures("in_tmp")
def test_a_member_in_the_way_of_an_attribute_of_every_module_is_refused(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = net()
    made[0].__dict__[table]["training"] = None
    torch.save(made, "model.pt")
    for code, err in both("model.pt", capsys):
        assert code == 4
        assert f"'training' among the {table} of a Conv2d is not a name" in err


@pytest.mark.usefixtures("in_tmp")
def test_layers_that_tell_the_truth_load() -> None:
    from padconvert.load import open_source

    model = nn.ModuleList([
        nn.Conv1d(4, 8, 3, padding="same", dilation=512), nn.Conv1d(4, 4, 31, padding=30 * 64, dilation=64, groups=4),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="reflect", groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), nn.Conv3d(1, 2, 3), nn.Linear(3, 4, bias=False),
        nn.Embedding(5, 3), nn.EmbeddingBag(5, 3), nn.BatchNorm2d(3), nn.BatchNorm1d(3, affine=False),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((2, 3)), nn.RMSNorm(4), nn.InstanceNorm2d(3), nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        nn.AdaptiveAvgPool2d((None, 7)), nn.AdaptiveMaxPool1d(3), nn.Upsample(scale_factor=2), nn.ZeroPad2d(-1),
        nn.Upsample(size=(7, 7)), nn.ReflectionPad1d(3), nn.MultiheadAttention(4, 2), nn.Bilinear(2, 3, 4),
    ])  # fmt: skip
    torch.save(model, "model.pt")
    module = open_source("model.pt").module
    assert module is not None
    assert [type(each) for each in module] == [type(each) for each in model]  # type: ignore[attr-defined]


# ---- bytes that changed, and pickles of other makers


@pytest.mark.parametrize("what", ["a module", "a state dict"])
def test_a_flipped_bit_of_a_weight_is_found(what: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = net()
    torch.save(made if what == "a module" else made.state_dict(), "model.pt")
    raw = bytearray((in_tmp / "model.pt").read_bytes())
    values = made[2].weight.detach().numpy().tobytes()  # type: ignore[operator]
    raw[raw.index(values) + 5] ^= 1
    (in_tmp / "model.pt").write_bytes(raw)
    from padconvert.load import open_source

    with pytest.raises(FileError, match=r"the record '2' is damaged"):
        open_source("model.pt")
    if what == "a module":
        assert ran("convert", "model.pt", "-o", "out.st", capsys=capsys)[0] == 4
        assert ran("inspect", "model.pt", capsys=capsys)[0] == 0  # reads no values


@pytest.mark.usefixtures("in_tmp")
def test_torch_may_leave_checksums_out() -> None:
    from padconvert.load import open_source

    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net(), "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_source("model.pt").module is not None


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("make", [*range(6), "instance", "truncated legacy", "behind an empty one", "before a zip"])
def test_a_pickle_of_no_model_is_judged_by_what_it_names(
    make: int | str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    evil = pickle.dumps({"a": [Evil()]}, 2)
    torch.save(net(), "good.pt")
    head = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    data = {
        "instance": b"(S'touch canary'\nios\nsystem\n.",
        "truncated legacy": head + evil,
        "behind an empty one": pickle.dumps({}, 2) + evil,
        "before a zip": evil + (in_tmp / "good.pt").read_bytes(),
    }
    raw = pickle.dumps({"a": [Evil()]}, make) if isinstance(make, int) else data[make]
    (in_tmp / "model.pt").write_bytes(raw)
    assert [code for code, _ in both("model.pt", capsys)] == [6, 6]
    document = json.loads(ran("inspect", "model.pt", "--audit", "--json", capsys=capsys)[1])
    assert document["verdict"] == "refused"
    assert [name["name"] for name in document["names"] if not name["allowed"]] in (["posix.system"], ["os.system"])
    assert not (in_tmp / "canary").exists()


def test_text_is_still_text(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("hello there\n", ".\n", "c\n", "import os\nos.system('x')\n", "item\nvalue\n", "cat\ndog\nbird\n"):
        (in_tmp / "model.pt").write_text(text)
        assert [code for code, _ in both("model.pt", capsys)] == [4, 4]


def test_a_network_nested_deeper_than_python_copies_is_a_plain_refusal(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: nn.Module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)
        for _ in range(240):
            made = nn.Sequential(made)
        torch.save(made, in_tmp / "model.pt")
    finally:
        sys.setrecursionlimit(before)
    code, _, err = ran("convert", "model.pt", capsys=capsys)
    assert code == 4
    assert "nested too deeply" in err


# ---- directories of transformers


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bert") / "model"
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def planted(kind: str, folder: Path) -> None:
    match kind:
        case "a link out":
            os.symlink("/etc/passwd", folder / "vocab.txt")
        case "a pipe":
            os.mkfifo(folder / "special_tokens_map.json")
        case "a file with holes":
            with (folder / "tokenizer.json").open("wb") as file:
                file.truncate(1 << 37)
        case "nothing":
            (folder / "vocab.txt").write_text("a")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("nothing", 0, ""), ("a link out", 6, "leads out of the directory"), ("a pipe", 4, "no regular file"),
        ("a file with holes", 4, "tokenizer.json is the largest, 137,438,953,472"),
    ],
)  # fmt: skip
def test_what_lies_beside_weights_is_judged_the_same_by_audit_and_convert(
    kind: str, code: int, said: str, bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bert, "model")
    planted(kind, in_tmp / "model")
    for found, err in both("model", capsys):
        assert found == code
        assert said in err


HUGE = {"vocab_size": 10**11, "intermediate_size": 10**10, "max_position_embeddings": 10**10}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", list(HUGE))
def test_a_config_that_asks_for_more_than_is_stored_is_refused_before_memory_is_touched(
    key: str, bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bert, "model")
    config = json.loads((in_tmp / "model/config.json").read_text())
    for size in (HUGE[key], 10**7):  # what no machine has, and what one would fill
        (in_tmp / "model/config.json").write_text(json.dumps(config | {key: size}))
        before, begun = peak(), time.monotonic()
        for code, err in both("model", capsys):
            assert code == 4
            assert "config" in err
        assert peak() - before < 500
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("key", list(HUGE))
def test_so_is_that_of_an_artefact(key: str, bert: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from padconvert.checkpoint.read import read_checkpoint
    from padconvert.load import rebuild

    assert ran("convert", str(bert), "-o", "out", "-q", capsys=capsys)[0] == 0
    checkpoint = read_checkpoint(in_tmp / "out")
    architecture = json.loads(json.dumps(checkpoint.manifest.architecture))
    names = [name for entry in checkpoint.manifest.layers for name in (entry.name, *entry.aliases)]
    assert names
    absent = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    kept = {name: checkpoint.tensor(name) for name in checkpoint.header.tensors if "_" not in name.split(".")[-1]}
    for size in (HUGE[key], 10**8):
        architecture["config"][key] = size
        before = peak()
        with pytest.raises(FileError, match=r"the artefact's config: "):
            rebuild(architecture, kept, (), absent)
        assert peak() - before < 500


# ---- words of a call


@pytest.mark.parametrize("words", [["--max-accuracy-drop", "0"], ["--lr", "0"]])
def test_a_bound_of_nothing_needs_data_too(words: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(net(), "model.pt")
    code, _, err = ran("convert", "model.pt", "-o", "out.st", *words, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert words[0] in err
    assert not (in_tmp / "out.st").exists()


# ---- exported programs


def _conv_to_empty(program: dict[str, Any]) -> None:
    nodes = program["graph_module"]["graph"]["nodes"]
    node = next(node for node in nodes if "conv2d" in node["target"])
    node["target"] = "torch.ops.aten.empty.memory_format"


LIES_OF_PROGRAMS: dict[str, tuple[Any, str]] = {
    "limits upside down": (
        lambda program: [limits.update(min_val=100, max_val=2) for limits in program["range_constraints"].values()],
        "the limits of s",
    ),
    "operators of 999": (lambda program: program.update(opset_version={"aten": 999}), "operators of version 999"),
    "operators of none": (lambda program: program.update(opset_version={}), "operators of version None"),
    "a convolution that is empty": (_conv_to_empty, "aten.empty.memory_format"),
    "no number": (lambda program: program.update(x=float("nan")), "NaN is no number"),
}


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("name", list(LIES_OF_PROGRAMS))
def test_a_program_that_contradicts_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = LIES_OF_PROGRAMS[name]
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(net(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, "sound.pt2")
    assert ran("inspect", "sound.pt2", "--audit", capsys=capsys)[0] == 0
    with zipfile.ZipFile("sound.pt2") as source, zipfile.ZipFile("model.pt2", "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if member.endswith("models/model.json"):
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            target.writestr(member, data)
    for code, err in both("model.pt2", capsys):
        assert code == 4
        assert said in err


# ---- what is said


def test_more_experts_than_any_network_has_is_a_word_of_the_policy(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net(), "model.pt")
    before = peak()
    code, _, err = ran("convert", "model.pt", "-o", "out.st", "--set", "defaults.num_experts=1000000000", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "num_experts: must be less than or equal to 65536" in err
    assert peak() - before < 100
    assert not (in_tmp / "out.st").exists()


def test_what_was_saved_in_place_of_a_model_is_said_in_words(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for saved, said in ((torch.Size([1, 2]), "a saved size"), (nn.Linear, "torch.nn.modules.linear.Linear by itself")):
        torch.save(saved, "model.pt")
        for code, err in both("model.pt", capsys):
            assert code == 4
            assert said in err
            assert "Node" not in err
    assert in_tmp.is_dir()


class Uncallable(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"needs\na table, not {tuple(x.shape)}")


def test_a_comparison_of_weights_says_so_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from padconvert.report.terminal import equality_line
    from padconvert.verify import NO_INPUTS, equality_by_weights

    found = equality_by_weights(net(), net(), NO_INPUTS)
    line = equality_line(found).plain
    assert line.startswith("· the same weights before training")
    assert line.endswith(f"no forward was compared: {NO_INPUTS}")
    monkeypatch.setattr("padconvert.verify.TOLERANCE", {torch.float32: -1.0})
    assert equality_line(equality_by_weights(net(), net(), NO_INPUTS)).plain.startswith("✗")


def test_why_no_forward_was_possible() -> None:
    from padconvert.verify import NO_INPUTS, equality
    from padconvert.walk.spec import InputSpec, ProbeSpec

    source = Uncallable(nn.Linear(2, 2))
    assert equality(source, source, None).why == NO_INPUTS
    probe = ProbeSpec((InputSpec(None, (2,), "float32"),), 0, "told")
    said = equality(source, source, probe)
    assert (said.method, said.passed) == ("weights", True)
    assert said.why.startswith("the source's own forward raises ValueError: needs a table, not (")
