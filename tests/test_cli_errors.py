"""Every bad input: one clear line, its exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from padconvert.__main__ import main
from padconvert.checkpoint.read import read_checkpoint

CLASSES = 3
STEPS = "--steps 10 --batch-size 8"

NETS = f"""
import sys
from torch import nn

def net(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3, padding=1),
        nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, {CLASSES}))

def broken():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    sys.exit(0)

def number():
    return 3
"""


class Runs:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch canary",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good source, data and artefacts, and everything that can be wrong with them."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "errornets.py").write_text(NETS)
    space: dict[str, Any] = {}
    exec(NETS, space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, other, nan, inf = (space["net"]().eval() for _ in range(4))
        with torch.no_grad():
            nan[3].weight[0, 0, 0, 0] = torch.nan
            inf[9].bias[1] = torch.inf
        saved: dict[str, object] = {
            "model.pt": model,
            "other.pt": other,
            "nan.pt": nan,
            "inf.pt": inf,
            "state.pt": model.state_dict(),
            "no_layers.pt": nn.Sequential(nn.ReLU(), nn.Flatten()),
            "head_only.pt": nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
            "own_class.pt": nn.Sequential(Own(), nn.Linear(4, 2)),
            "number.pt": {"epoch": 3},
            "evil.pt": {"state_dict": Runs()},
        }
        for name, value in saved.items():
            torch.save(value, folder / name)
    (folder / "evil_plain.pt").write_bytes(pickle.dumps(Runs()))
    good = (folder / "model.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(good[: len(good) // 2])
    (folder / "text.pt").write_text("weights to follow\n")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "noise.pt").write_bytes(np.random.RandomState(0).bytes(4096))
    (folder / "folder").mkdir()
    _write_data(folder)
    _write_policies(folder)
    _write_artefacts(folder)
    return folder


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _write_data(folder: Path) -> None:
    x = np.random.RandomState(0).randn(64, 1, 8, 8).astype("float32")
    y = np.random.RandomState(1).randint(0, CLASSES, 64)
    y[:CLASSES] = range(CLASSES)
    broken = x.copy()
    broken[40, 0, 2, 2] = np.nan
    for name, arrays in {
        "data": {"x": x, "y": y},
        "high": {"x": x, "y": y + 1},
        "negative": {"x": x, "y": y - 1},
        "channels": {"x": x.repeat(3, axis=1), "y": y},
        "flat": {"x": x.reshape(64, 64), "y": y},
        "short": {"x": x, "y": y[:60]},
        "nan": {"x": broken, "y": y},
        "unnamed": {"images": x, "labels": y},
        "none": {"x": x[:0], "y": y[:0]},
        "unlabelled": {"x": x},
    }.items():
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    (folder / "broken.npz").write_bytes((folder / "data.npz").read_bytes()[:2000])


def _write_policies(folder: Path) -> None:
    for name, text in {
        "two": "version: 1\ndefaults: {dynamic_ratio: 1.5, num_experts: 1}\ntrian: {steps: 3}\n",
        "fraction": "version: 1\ndefaults:\n  num_experts: 2.5\n",
        "minus": "version: 1\ndefaults: {dynamic_ratio: -0.1}\n",
        "nan": "version: 1\ndefaults: {dynamic_ratio: .nan}\n",
        "score": "version: 1\npartition: {score: tailor}\n",
        "rule": "version: 1\nrules:\n  - {name: layer9, convert: false}\n",
        "old": "version: 7\n",
        "bomb": "version: 1\nrules: &a [*a, *a]\n",
        "twice": "version: 1\nversion: 1\n",
        "code": "version: 1\ndefaults: !!python/object/apply:os.system ['touch canary']\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)


def _write_artefacts(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["convert", "model.pt", "-o", "free.st", "-q", "--plan-out", "plan.json"]) == 0
        assert main(["convert", "model.pt", "-o", "trained.st", "-q", "--data", "data.npz", *STEPS.split()]) == 0
    finally:
        os.chdir(here)
    checkpoint = read_checkpoint(folder / "free.st")
    data = bytearray((folder / "free.st").read_bytes())
    data[-1] ^= 1
    (folder / "flipped.st").write_bytes(data)
    (folder / "cut.st").write_bytes(data[:-10])
    (folder / "cut_in_header.st").write_bytes(data[:100])
    assert checkpoint.manifest.layers


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(files)
    monkeypatch.delenv("PADCONVERT_DEBUG", raising=False)
    yield files
    shutil.rmtree(files / "__pycache__", ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


#: the call, its exit code, and words of its message
CASES: list[tuple[str, int, tuple[str, ...]]] = [
    # ---- the source
    ("convert truncated.pt", 4, ("truncated.pt", "damaged or cut off")),
    ("convert text.pt", 4, ("text.pt", "a text file", "torch.save")),
    ("convert empty.pt", 4, ("empty.pt", "empty")),
    ("convert noise.pt", 4, ("noise.pt",)),
    ("convert number.pt", 4, ("number.pt",)),
    ("convert missing.pt", 4, ("missing.pt", "No such file")),
    ("convert folder", 4, ("folder", "config.json")),
    ("convert data.npz", 4, ("data.npz", "arrays, not a model")),
    ("convert nan.pt", 4, ("nan.pt", "'3.weight'", "NaN")),
    ("convert inf.pt", 4, ("inf.pt", "'9.bias'", "infinity")),
    ("convert no_layers.pt", 5, ("no convolution or linear layer",)),
    ("convert head_only.pt", 5, ("head_static", "convert: true")),
    ("convert evil.pt", 6, ("evil.pt", "posix.system")),
    ("convert evil_plain.pt", 6, ("evil_plain.pt", "asks for code")),
    ("inspect evil.pt", 6, ("posix.system",)),
    ("convert evil.pt --trust os", 2, ("--trust os",)),
    ("convert evil.pt --trust posix", 2, ("--trust posix",)),
    ("convert own_class.pt", 6, (f"{__name__}.Own", f"--trust {__name__}")),
    ("convert model.pt --trust a/b", 2, ("--trust a/b",)),
    # ---- an architecture
    ("convert state.pt", 4, ("state.pt", "no architecture", "--arch")),
    ("convert state.pt --arch errornets:net --arch-arg width=5", 4, ("another architecture", "[5, 1, 3, 3]")),
    ("inspect state.pt --arch errornets:net --arch-arg width=5", 4, ("another architecture",)),
    ("convert state.pt --arch errornets:net --arch-arg depth=5", 2, ("'depth'", "width=4")),
    ("convert state.pt --arch errornets:nett", 2, ("Did you mean 'net'",)),
    ("convert state.pt --arch nowhere:net", 2, ("nowhere:net", "no such module")),
    ("convert state.pt --arch errornets", 2, ("package.module:function",)),
    ("convert state.pt --arch errornets:broken", 2, ("RuntimeError: first line",)),
    ("convert state.pt --arch errornets:leaves", 2, ("SystemExit",)),
    ("convert state.pt --arch errornets:number", 2, ("int", "torch.nn.Module")),
    ("convert model.pt --arch errornets:net", 2, ("--arch", "whole model")),
    ("convert model.pt --arch-arg width=3", 2, ("--arch-arg needs --arch",)),
    # ---- the policy, by options
    ("convert model.pt --dynamic-ratio 1.5", 2, ("--dynamic-ratio", "1.5", "less than or equal to 1")),
    ("convert model.pt --dynamic-ratio -0.1", 2, ("--dynamic-ratio", "-0.1", "greater than or equal to 0")),
    ("convert model.pt --dynamic-ratio nan", 2, ("--dynamic-ratio", "finite")),
    ("convert model.pt --experts 1", 2, ("--experts", "greater than or equal to 2, not 1")),
    ("convert model.pt --experts 2.5", 2, ("--experts", "integer")),
    ("convert model.pt --experts 99999999999", 2, ("--experts", "65536")),
    ("convert model.pt --granularity filter", 2, ("--granularity", "'element', 'channel'")),
    ("convert model.pt --granularity neuron", 3, ("neuron", "'channel' or 'element'")),
    ("convert model.pt --preset papr", 2, ("--preset papr", "Did you mean 'paper'")),
    ("convert model.pt --set partition.score=tailor", 2, ("tailor", "taylor, variance")),
    ("convert model.pt --set defaults.ratio=0.5", 2, ("defaults.ratio", "unknown")),
    ("convert model.pt --set nowhere.ratio=0.5", 2, ("no 'nowhere'",)),
    ("convert model.pt --set train.steps", 2, ("KEY=VALUE",)),
    ("convert model.pt --seed -1", 2, ("--seed -1", "4294967295")),
    ("convert model.pt --seed 99999999999999999999", 2, ("--seed", "4294967295")),
    # ---- the policy, by file
    ("convert model.pt --policy missing.yaml", 3, ("missing.yaml", "No such file")),
    ("convert model.pt --policy folder", 3, ("folder", "Is a directory")),
    ("convert model.pt --policy model.pt", 3, ("model.pt", "UTF-8")),
    ("convert model.pt --policy two.yaml", 3, ("two.yaml:2", "1.5", "not 1", "two.yaml:3", "trian", "'train'")),
    ("convert model.pt --policy fraction.yaml", 3, ("fraction.yaml:3", "num_experts")),
    ("convert model.pt --policy minus.yaml", 3, ("minus.yaml:2", "-0.1")),
    ("convert model.pt --policy nan.yaml", 3, ("nan.yaml:2", "finite")),
    ("convert model.pt --policy score.yaml", 3, ("score.yaml:2", "tailor", "taylor")),
    ("convert model.pt --policy rule.yaml", 3, ("rule.yaml:3", "rules[0].name", "'layer9'", "matches no layer")),
    ("convert model.pt --policy old.yaml", 3, ("old.yaml:1", "version")),
    ("convert model.pt --policy bomb.yaml", 3, ("bomb.yaml",)),
    ("convert model.pt --policy twice.yaml", 3, ("twice.yaml:2", "version")),
    ("convert model.pt --policy code.yaml", 3, ("code.yaml:2",)),
    ("policy check two.yaml", 3, ("two.yaml:2", "two.yaml:3")),
    # ---- data
    (f"convert model.pt --data missing.npz {STEPS}", 4, ("missing.npz", "does not exist")),
    (f"convert model.pt --data text.pt {STEPS}", 4, ("text.pt", ".npz")),
    (f"convert model.pt --data folder {STEPS}", 4, ("folder", "no images")),
    (f"convert model.pt --data broken.npz {STEPS}", 4, ("broken.npz", "not a readable .npz")),
    (f"convert model.pt --data channels.npz {STEPS}", 4, ("the training data", "[2, 3, 8, 8]")),
    (f"convert model.pt --data flat.npz {STEPS}", 4, ("the training data", "[2, 64]")),
    (f"convert model.pt --data short.npz {STEPS}", 4, ("short.npz", "64", "60")),
    (f"convert model.pt --data none.npz {STEPS}", 4, ("none.npz",)),
    (f"convert model.pt --data unnamed.npz {STEPS}", 4, ("'x'", "images, labels", "data.input_key")),
    (f"convert model.pt --data high.npz {STEPS}", 4, ("the training data", "label 3", "from 0 to 2")),
    (f"convert model.pt --data negative.npz {STEPS}", 4, ("the training data", "label -1", "from 0 to 2")),
    (f"convert model.pt --data data.npz --eval-data high.npz {STEPS}", 4, ("the evaluation data", "label 3")),
    (f"convert model.pt --data data.npz --eval-data channels.npz {STEPS}", 4, ("the evaluation data", "[2, 3, 8, 8]")),
    (f"convert model.pt --data nan.npz {STEPS}", 4, ("nan.npz", "example 40", "NaN")),
    (f"convert model.pt --data errornets:broken {STEPS}", 4, ("errornets.py", "RuntimeError: first line")),
    (f"convert model.pt --data errornets:leaves {STEPS}", 4, ("errornets.py", "SystemExit")),
    (f"convert model.pt --data errornets:absent {STEPS}", 4, ("no function 'absent'",)),
    ("convert model.pt --eval-data data.npz", 2, ("--eval-data", "--data")),
    ("convert model.pt --compare", 2, ("--compare", "--data")),
    (f"convert model.pt --compare --data unlabelled.npz {STEPS}", 2, ("--compare", "nothing is trained", "augment")),
    # ---- training
    (f"convert model.pt --data data.npz --lr 1e30 {STEPS}", 7, ("not finite at step", "the output of layer", "--lr")),
    (f"convert model.pt --data data.npz --lr 1e8 {STEPS}", 7, ("not finite", "layer", "learning rate")),
    (f"convert model.pt --data data.npz --lr -1 {STEPS}", 2, ("--lr", "greater than 0")),
    (f"convert model.pt --data data.npz --lr nan {STEPS}", 2, ("--lr", "finite")),
    (f"convert model.pt --data data.npz --set train.expert_lr_scale=0 {STEPS}", 2, ("expert_lr_scale", "than 0")),
    ("convert model.pt --data data.npz --steps 0", 2, ("--steps", "1")),
    ("convert model.pt --data data.npz --steps 3 --set train.warmup=0", 2, ("train.steps 3", "before any step")),
    ("convert model.pt --data data.npz --batch-size 0", 2, ("--batch-size", "1")),
    (f"convert model.pt --data data.npz --work-dir model.pt {STEPS}", 4, ("--work-dir model.pt",)),
    # ---- the output
    ("convert model.pt -o free.st", 2, ("free.st exists", "--force")),
    ("convert model.pt -o model.pt", 2, ("the source itself",)),
    ("convert model.pt -o model.pt --force", 2, ("the source itself", "never overwritten")),
    ("convert free.st -o free.st --force", 2, ("the source itself",)),
    ("convert model.pt -o folder", 2, ("folder is a folder",)),
    ("convert model.pt -o nowhere/out.st", 4, ("nowhere", "does not exist")),
    ("convert model.pt -o model.pt/out.st", 4, ("model.pt/out.st",)),
    ("convert model.pt -o /dev/null --force", 2, ("no regular file",)),
    ("convert model.pt --plan-out model.pt --dry-run", 2, ("the source itself",)),
    ("convert model.pt --plan-out plan.json --dry-run", 2, ("plan.json exists", "--force")),
    ("convert model.pt --plan-out both -o both", 2, ("--plan-out both", "output as well")),
    ("convert model.pt --report nowhere/report.html", 4, ("--report", "folder")),
    ("convert model.pt --report report.txt", 2, ("--report", ".html")),
    # ---- a plan
    ("convert model.pt --plan missing.json", 4, ("missing.json",)),
    ("convert model.pt --plan text.pt", 3, ("text.pt", "not JSON")),
    ("convert other.pt --plan plan.json", 3, ("another source", "--plan-out")),
    ("convert model.pt --plan plan.json --dynamic-ratio 0.5", 2, ("--dynamic-ratio says 0.5", "0.3")),
    ("convert model.pt --plan plan.json --preset small", 2, ("preset small",)),
    ("convert model.pt --plan plan.json --seed 3", 2, ("--seed 0",)),
    (f"convert model.pt --plan plan.json --data data.npz {STEPS}", 2, ("data-free route", "trained one")),
    # ---- an artefact
    ("convert trained.st -o more.st", 2, ("--data",)),
    (f"convert trained.st -o more.st --dynamic-ratio 0.5 --data data.npz {STEPS}", 2, ("keeps its partition",)),
    (f"convert trained.st -o more.st --compare --data data.npz {STEPS}", 2, ("--compare", "static source")),
    ("convert cut.st -o more.st", 4, ("cut.st",)),
    ("convert flipped.st -o more.st", 4, ("flipped.st",)),
    ("verify missing.st", 4, ("missing.st", "No such file")),
    ("verify model.pt", 4, ("model.pt", "not an artefact of padconvert")),
    ("verify folder", 4, ("folder",)),
    ("verify cut.st", 4, ("cut.st",)),
    ("verify cut_in_header.st", 4, ("cut_in_header.st",)),
    ("verify free.st --against text.pt", 4, ("text.pt", "a text file")),
    ("verify free.st --data channels.npz", 4, ("channels.npz", "[2, 3, 8, 8]")),
    ("verify free.st --data high.npz", 4, ("high.npz", "label 3")),
    ("verify free.st --data unlabelled.npz", 4, ("unlabelled.npz", "no labels")),
    ("verify free.st --device warp", 2, ("--device warp", "doctor")),
    ("verify free.st --arch errornets:net --arch-arg width=5", 4, ("another architecture",)),
    # ---- words
    ("convert model.pt --device warp", 2, ("--device warp", "doctor")),
    ("convert model.pt --device meta", 2, ("--device meta", "doctor")),
    ("convert model.pt --device xla", 2, ("--device xla", "doctor")),
    ("convert model.pt --input-shape 3", 2, ("--input-shape 3", "1,3,32,32")),
    ("convert model.pt --bogus", 2, ("--bogus", "--help")),
    ("convert model.pt --steps many", 2, ("--steps", "integer")),
    ("convert", 2, ("source", "--help")),
    ("convert model.pt other.pt", 2, ("other.pt",)),
    ("inspect model.pt --audit --data train.npz --task classification", 2, ("--data, --task", "--audit loads nothing")),
    ("inspect missing.pt", 4, ("missing.pt",)),
    ("policy explain nothing --plan plan.json", 2, ("'nothing'",)),
]  # fmt: skip

LISTS = ("two.yaml",)


@pytest.mark.parametrize(("words", "code", "said"), CASES, ids=[case[0] for case in CASES])
def test_one_clear_line_its_exit_code_and_nothing_left_behind(
    words: str, code: int, said: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    takes_json = words.partition(" ")[0] != "policy"
    found = main([*words.split(), *(["--json"] if takes_json else [])])
    captured = capsys.readouterr()
    assert (found, captured.err[:7]) == (code, "error: ")
    assert [word for word in said if word not in captured.err] == [], captured.err
    assert "Traceback" not in captured.err
    assert "internal" not in captured.err
    assert captured.err.count("\n") == 1 or any(name in words for name in LISTS)
    assert len(captured.err) < 600
    if takes_json:
        document = json.loads(captured.out)
        assert document == {
            "schema": "padconvert.error/1", "error": captured.err.removeprefix("error: ").removesuffix("\n"),
            "exit_code": code,
        }  # fmt: skip
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "failed"),
    [
        ("verify flipped.st", ["checksums"]),
        ("verify free.st --against other.pt", ["source sha256"]),
        ("verify free.st --against state.pt", ["source sha256"]),
        ("verify trained.st --against other.pt", ["source sha256"]),
    ],
)
def test_a_failed_check_is_7_and_named(
    words: str, failed: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    assert main([*words.split(), "--json"]) == 7
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["schema"], document["passed"]) == ("padconvert.verify/1", False)
    assert [check["name"] for check in document["checks"] if not check["passed"]] == failed
    assert captured.err.count("\n") == 1
    assert f"{words.split()[1]}: does not hold: {', '.join(failed)}" in captured.err
    assert contents(here) == before


def flipped(data: bytes, place: int, path: Path) -> str:
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    return str(path)


def test_a_flipped_bit_in_any_tensor_is_7(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (here / "free.st").read_bytes()
    header = read_checkpoint(here / "free.st").header
    for name, slot in header.tensors.items():
        place = header.data_start + (slot.begin + slot.end) // 2
        assert main(["verify", flipped(data, place, tmp_path / "flipped.st")]) == 7, name
        assert f"the bytes of '{name}' are damaged" in " ".join(capsys.readouterr().out.split())


def test_a_flipped_bit_anywhere_in_the_header_is_4(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stride, a provenance, a tensor's dtype: no tensor's checksum would show it."""
    data = (here / "free.st").read_bytes()
    for place in range(0, read_checkpoint(here / "free.st").header.data_start, 41):
        assert main(["verify", flipped(data, place, tmp_path / "flipped.st")]) == 4, place
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'flipped.st'}: ")
        assert said.count("\n") == 1


def test_a_file_that_contradicts_its_probe_is_7(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another network than the one it was made from, loaded without a complaint."""
    monkeypatch.syspath_prepend(str(here))
    torch.save(torch.nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), tmp_path / "m.pt")
    assert main(["convert", str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.st")]) == 0
    (tmp_path / "probenets.py").write_text(
        "from torch import nn\n"
        "class Turned(nn.Sequential):\n"
        "    def forward(self, x):\n        return super().forward(x) * 2\n"
        "class Raises(nn.Sequential):\n"
        "    def forward(self, x):\n        raise RuntimeError('no more')\n"
        "def net(kind):\n"
        "    layers = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)\n"
        "    return (Turned if kind == 'turned' else Raises)(*layers)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind in ("turned", "raises"):
        words = ["verify", str(tmp_path / "m.st"), "--arch", "probenets:net", "--arch-arg", f"kind={kind}", "--json"]
        capsys.readouterr()
        assert main(words) == 7
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
        assert checks["probe"]["passed"] is False
        assert checks["probe"]["value"] is None if kind == "raises" else checks["probe"]["value"] > 0.5
        assert kind == "turned" or "RuntimeError: no more" in checks["probe"]["detail"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_an_artefact_cut_off_anywhere_is_4(
    share: float, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (here / "trained.st").read_bytes()
    (tmp_path / "cut.st").write_bytes(data[: int(len(data) * share)])
    assert main(["verify", str(tmp_path / "cut.st")]) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(["convert", str(here / "model.pt"), "-o", str(tmp_path / "out.st")]) == 4
    assert "cannot be written to" in capsys.readouterr().err


def test_a_folder_that_the_system_calls_read_only(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # noqa: ARG005
    assert main(["convert", str(here / "model.pt"), "-o", str(tmp_path / "out.st")]) == 4
    assert f"the folder {tmp_path} cannot be written to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "said"), [(28, "the disk is full"), (30, "cannot be written to")])
def test_a_disk_that_refuses_at_the_end_leaves_the_old_output(
    number: int, said: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "out.st").write_bytes(b"yesterday")
    monkeypatch.setattr("padconvert.checkpoint.write.os.fsync", refuse)
    assert main(["convert", str(here / "model.pt"), "-o", str(tmp_path / "out.st"), "--force"]) == 4
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.st": b"yesterday"}


def test_a_plan_is_carried_out_with_the_words_it_was_made_with(here: Path, tmp_path: Path) -> None:
    """What `--plan` refuses must not be what made the plan."""
    made = ["--dynamic-ratio", "0.5", "--seed", "3", "--set", "rules=[{name: '3', experts: 2, convert: true}]"]
    made[-1] = "rules=[{name: '3', num_experts: 2}]"
    plan, free = tmp_path / "plan.json", [tmp_path / "planned.st", tmp_path / "free.st"]
    assert main(["convert", str(here / "model.pt"), "--dry-run", "--plan-out", str(plan), *made]) == 0
    for words, output in (["--plan", str(plan)], free[0]), ([], free[1]):
        assert main(["convert", str(here / "model.pt"), "-o", str(output), *made, *words]) == 0
    assert free[0].read_bytes() == free[1].read_bytes()
    assert main(["convert", str(here / "model.pt"), "-o", str(tmp_path / "bare.st"), "--plan", str(plan)]) == 2
    bare = ["convert", str(here / "model.pt"), "-o", str(tmp_path / "bare.st"), "--plan", str(plan), "--seed", "3"]
    assert main(bare) == 0
    assert (tmp_path / "bare.st").read_bytes() == free[0].read_bytes()
