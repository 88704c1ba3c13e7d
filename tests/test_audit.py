"""`inspect --audit`: the verdict on any file, without loading it, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from load_attacks import ATTACKS, TRUSTED, TRUSTED_CODE, Call, module_file
from padconvert.__main__ import main
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.manifest import KEY, manifest_from_json, metadata_of
from padconvert.checkpoint.read import read_checkpoint
from padconvert.errors import FileError, UnsafeError
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.examine import examine


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()  # fmt: skip


def audited(path: str | Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main(["inspect", str(path), "--audit", "--json", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


NETS = """
from torch import nn

class Net(nn.Linear):
    pass

def make():
    open('canary', 'w')
    return Net(2, 2)
"""

Make = Callable[[], object]
#: what is saved under model.pt, its kind, and its verdict
FILES: dict[str, tuple[Make, str, str, int]] = {
    "a module": (net, "module", "safe", 0),
    "a state dict": (lambda: net().state_dict(), "state_dict", "safe", 0),
    "a checkpoint": (lambda: {"model": net().state_dict(), "epoch": 3}, "checkpoint", "safe", 0),
    "an attack": (lambda: {"state_dict": Call(os.system, "touch canary")}, "pickle", "refused", 6),
    "an attack beside weights": (
        lambda: {"model": net(), "x": Call(os.system, "touch canary")},
        "pickle",
        "refused",
        6,
    ),
    "no network": (lambda: {"epoch": 3}, "pickle", "unreadable", 4),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(FILES))
def test_a_pickled_file(name: str, legacy: bool, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, kind, verdict, code = FILES[name]
    torch.save(make(), "model.pt", _use_new_zipfile_serialization=not legacy)
    found, document, said = audited("model.pt", capsys=capsys)
    assert (found, document["schema"], document["kind"]) == (code, "padconvert.audit/1", kind)
    assert (document["verdict"], document["bytes"]) == (verdict, (in_tmp / "model.pt").stat().st_size)
    assert said == ("" if code == 0 else f"error: {document['detail']}\n")
    refused = [name["name"] for name in document["names"] if not name["allowed"]]
    assert refused == (["posix.system"] if verdict == "refused" else [])
    assert not (in_tmp / "canary").exists()
    if not legacy:
        sizes = {member["name"].partition("/")[2]: member["bytes"] for member in document["members"]}
        assert sizes["data.pkl"] > 20
        assert sizes.get("data/0", 288) == 288  # 8 filters of 3 × 3 in fp32


def test_every_name_says_why_it_is_allowed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    model.__dict__["act"] = torch.tanh
    torch.save({"model": model, "lr": __import__("numpy").float64(1)}, "model.pt")
    _, document, _ = audited("model.pt", capsys=capsys)
    why = {name["name"]: name["why"] for name in document["names"]}
    assert why["torch.nn.modules.conv.Conv2d"] == "a class of a listed package"
    assert why["torch._utils._rebuild_tensor_v2"] == "read as data"
    assert [reason for name, reason in why.items() if name.startswith("numpy.")] == ["left unread"] * sum(
        name.startswith("numpy.") for name in why
    )
    assert any(name.startswith("numpy.") for name in why)
    assert document["verdict"] == "safe", in_tmp


def test_a_class_of_a_package_needs_trust(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "auditnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(in_tmp))
    module_file(in_tmp / "model.pt", "auditnets.Net")
    code, document, _ = audited("model.pt", capsys=capsys)
    assert (code, document["verdict"], document["trust"]) == (6, "trust", ["auditnets"])
    assert main(["inspect", "model.pt", "--audit"]) == 6
    assert "needs --trust auditnets: its classes" in capsys.readouterr().out
    assert audited("model.pt", "--trust", "auditnets", capsys=capsys)[1]["trust"] == []
    for name in ("__main__.Net", "torch.fx.Net", "os.system"):
        module_file(in_tmp / "model.pt", name)
        code, document, _ = audited("model.pt", capsys=capsys)
        assert (code, document["verdict"], document["trust"]) == (6, "refused", [])
    assert audited("model.pt", "--trust", "os", capsys=capsys)[0:1] == (2,)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_gets_the_verdict_and_the_code_of_loading(
    name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / f"{TRUSTED}.py").write_text(TRUSTED_CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(in_tmp))
    ATTACKS[name][0](in_tmp / "model.pt")
    if name == "truth_values_of_255":
        pytest.skip("an audit reads no tensor's values")
    found = examine("model.pt", (TRUSTED,))
    with pytest.raises((FileError, UnsafeError)) as raised:
        open_source("model.pt", trust=(TRUSTED,))
    assert (found.exit_code, found.detail) == (raised.value.exit_code, str(raised.value).replace(f"{in_tmp}/", ""))
    assert not (in_tmp / "canary").exists()


def test_other_files(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, "model.safetensors")
    code, document, _ = audited("model.safetensors", capsys=capsys)
    assert (code, document["kind"], document["members"]) == (0, "safetensors", [{"name": "a.weight", "bytes": 48}])
    whole = (in_tmp / "model.safetensors").read_bytes()
    (in_tmp / "cut.safetensors").write_bytes(whole[:-1])
    (in_tmp / "text.pt").write_text("hello there")
    (in_tmp / "folder").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "script.pt")
    for name in ("cut.safetensors", "text.pt", "folder", "missing.pt", "script.pt"):
        code, document, said = audited(name, capsys=capsys)
        assert (code, document["verdict"], said.count("\n")) == (4, "unreadable", 1), name
    assert "TorchScript" in said
    assert [m["name"].partition("/")[2] for m in document["members"] if "constants" in m["name"]] == ["constants.pkl"]


@pytest.fixture
def artefact(in_tmp: Path) -> Path:
    torch.save(net(), "model.pt")
    assert main(["convert", "model.pt", "-o", "model.st", "-q"]) == 0
    return in_tmp / "model.st"


def rewritten(path: Path, architecture: dict[str, Any]) -> None:
    """The artefact with another architecture in its manifest, and checksums that agree."""
    header = read_header(path)
    body = path.read_bytes()[header.data_start :]
    specs = {name: (slot.dtype, slot.shape) for name, slot in header.tensors.items()}
    manifest = replace(manifest_from_json(header.metadata[KEY]), architecture=architecture)
    encoded, _ = encode_header(specs, metadata_of(manifest, specs))
    path.write_bytes(encoded + body)


def test_an_artefact(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = audited(artefact, capsys=capsys)
    names = {name["name"] for name in document["names"]}
    assert (code, document["kind"], document["verdict"]) == (0, "artefact", "safe")
    assert "torch.nn.modules.conv.Conv2d" in names
    assert {"2.weight_dynamic", "6.bias"} <= {member["name"] for member in document["members"]}
    assert sum(member["bytes"] for member in document["members"]) < document["bytes"] == artefact.stat().st_size


@pytest.mark.parametrize(
    ("ref", "verdict", "trust"),
    [
        ("os:system", "refused", []),
        ("builtins:exec", "refused", []),
        ("torch.hub:load", "refused", []),
        ("__main__:make", "refused", []),
        ("auditnets:make", "trust", ["auditnets"]),
    ],
)
def test_an_artefact_that_names_its_factory(
    ref: str, verdict: str, trust: list[str], artefact: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (artefact.parent / "auditnets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(artefact.parent))
    rewritten(artefact, {"kind": "factory", "ref": ref, "args": {}})
    code, document, said = audited(artefact, capsys=capsys)
    assert (code, document["verdict"], document["trust"]) == (6, verdict, trust)
    assert [name["name"] for name in document["names"] if not name["allowed"]] == [ref.replace(":", ".")]
    assert ref in said
    with pytest.raises(UnsafeError) as raised:
        load(artefact)
    # advice names only what would work
    assert ("--trust auditnets" in str(raised.value)) == bool(trust)
    assert "no --trust allows it" in str(raised.value) or trust
    assert "into=" in str(raised.value)
    if trust:
        assert audited(artefact, "--trust", "auditnets", capsys=capsys)[0] == 0
    assert not (artefact.parent / "canary").exists()


@pytest.mark.parametrize("ref", ["os", "a b:c", "os:", "x:y\nz", None])
def test_a_factory_without_a_name_is_a_damaged_file(ref: str | None, artefact: Path) -> None:
    rewritten(artefact, {"kind": "factory", "ref": ref, "args": {}})
    with pytest.raises(FileError, match="no function's name") as raised:
        load(artefact, trust=("a", "x"))
    assert "\n" not in str(raised.value)


def test_an_artefact_whose_skeleton_names_code(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = read_checkpoint(artefact).manifest.architecture
    changed = json.loads(json.dumps(architecture).replace("torch.nn.modules.activation", "posix"))
    assert changed != architecture
    rewritten(artefact, changed)
    code, document, _ = audited(artefact, capsys=capsys)
    assert (code, document["verdict"]) == (6, "refused")
    assert [name["name"] for name in document["names"] if not name["allowed"]] == ["posix.ReLU"]


def test_the_report_lists_what_is_refused_and_what_to_do(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Call(os.system, "touch canary")}, "model.pt")
    shutil.copy("model.pt", "again.pt")
    assert main(["inspect", "again.pt", "--audit"]) == 6
    captured = capsys.readouterr()
    assert "✗ posix.system: no flag allows it." in " ".join(captured.out.split())
    assert captured.out.rstrip().endswith("refused")
    assert captured.err == "error: again.pt: asks for code that is not on the list: posix.system; no flag allows it. " \
        "Save the state dict and name a factory with --arch.\n"  # fmt: skip
    assert not (in_tmp / "canary").exists()
