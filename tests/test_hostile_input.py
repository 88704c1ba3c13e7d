"""Files and words made to deceive, to block or to exhaust: each is one clear line, the same from audit and convert."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import time
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
