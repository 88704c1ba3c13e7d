"""`padconvert policy …`: what each command prints, and that none of them imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from padconvert.cli.policy import app
from padconvert.errors import FileError, PolicyError, UsageError
from padconvert.policy import load_policy


def run(*words: str) -> None:
    app(list(words), standalone_mode=False)


def test_init_check_show(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("init", "--preset", "small")
    run("check", "padconvert.yaml")
    assert capsys.readouterr().out == "wrote padconvert.yaml\npadconvert.yaml: ok\n"
    run("show", "--set", "train.steps=7")
    shown = capsys.readouterr().out
    assert "  steps: 7  # option --set train.steps=7\n" in shown
    assert "  dynamic_ratio: 0.1  # preset small\n" in shown
    (in_tmp / "shown.yaml").write_text(shown)
    assert load_policy(in_tmp / "shown.yaml").policy.train.steps == 7


def test_init_keeps_what_is_there(in_tmp: Path) -> None:
    (in_tmp / "mine.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.yaml exists; name another file, or replace it with --force"):
        run("init", "mine.yaml")
    assert (in_tmp / "mine.yaml").read_text() == "mine"
    run("init", "mine.yaml", "--force")
    assert "extends: paper" in (in_tmp / "mine.yaml").read_text()
    with pytest.raises(FileError, match="cannot be written"):
        run("init", "nowhere/mine.yaml")


def test_check_holds_a_working_file_to_its_rules(in_tmp: Path) -> None:
    text = "version: 1\ndata: {train: pkg.mod:f}\n"
    (in_tmp / "other.yaml").write_text(text)
    (in_tmp / "padconvert.yaml").write_text(text)
    run("check", "other.yaml")
    with pytest.raises(PolicyError, match="may not run code"):
        run("check", "padconvert.yaml")


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("schema")
    document = json.loads(capsys.readouterr().out)
    assert document["properties"]["version"]["const"] == 1


def test_explain_needs_a_plan(in_tmp: Path) -> None:
    with pytest.raises(FileError, match="the plan cannot be read"):
        run("explain", "conv1", "--plan", "none.json")
    (in_tmp / "plan.json").write_text("{}")
    with pytest.raises(PolicyError, match="schema is None"):
        run("explain", "conv1", "--plan", "plan.json")


def test_no_torch(in_tmp: Path) -> None:
    (in_tmp / "p.yaml").write_text("version: 1\n")
    code = (
        "import sys\nfrom padconvert.cli.policy import app\nimport padconvert.plan\n"
        "app(['check', 'p.yaml'], standalone_mode=False)\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "p.yaml: ok\n", "")


def test_check_as_one_document(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "good.yaml").write_text("version: 1\n")
    (in_tmp / "bad.yaml").write_text("version: 1\ntran: 3\ndefaults: {num_experts: 1}\n")
    (in_tmp / "one.yaml").write_text("version: 1\ntran: 3\n")
    found = {}
    for name in ("good", "bad", "one"):
        code = app(["check", f"{name}.yaml", "--json"], standalone_mode=False)
        found[name] = (code or 0, json.loads(capsys.readouterr().out))
    schema = "padconvert.policy-check/1"
    assert found["good"] == (0, {"schema": schema, "file": "good.yaml", "ok": True, "problems": []})
    code, document = found["bad"]
    assert (code, document["ok"]) == (3, False)
    assert [problem.split(": ")[:2] for problem in document["problems"]] == [
        ["bad.yaml:2", "tran"],
        ["bad.yaml:3", "defaults.num_experts"],
    ]
    assert [problem.split(": ")[0] for problem in found["one"][1]["problems"]] == ["one.yaml:2"]
