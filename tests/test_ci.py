"""The workflow to copy: valid YAML, every command with options that there are, every JSON key it reads."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
import yaml
from torch import nn

from padconvert.__main__ import main
from padconvert.cli.app import app
from padconvert.policy import load_policy

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "docs" / "ci" / "padconvert.yml"
PAGE = ROOT / "docs" / "ci.md"


def scripts() -> list[str]:
    """Every shell line of the workflow, continued ones joined."""
    document = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    steps = [step for job in document["jobs"].values() for step in job["steps"]]
    text = "\n".join(step["run"] for step in steps if "run" in step)
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def commands() -> list[list[str]]:
    """The words of every call of padconvert, without what the shell does with its output."""
    called = [shlex.split(line, comments=True) for line in scripts() if line.startswith("padconvert ")]
    return [words[1 : words.index(">")] if ">" in words else words[1:] for words in called]


def test_the_workflow_is_what_github_reads() -> None:
    document = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(document) == {"name", True, "permissions", "jobs"}  # `on` is a truth value in YAML 1.1
    for job in document["jobs"].values():
        assert {"runs-on", "steps"} <= set(job)
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert set(step) <= {"name", "run", "uses", "with", "if"}
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@v\d+", step["uses"])


def test_every_option_in_the_workflow_exists() -> None:
    root: Any = typer.main.get_command(app)
    found = commands()
    assert [words[0] for words in found] == ["inspect", "policy", "convert", "convert", "verify"]
    for words in found:
        command = root.commands[words[0]]
        command = command.commands[words[1]] if hasattr(command, "commands") else command
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in words if word.startswith("-")}
        assert used <= known, f"{' '.join(words)}: {sorted(used - known)}"
    gates = {"--strict", "--require-layers", "--max-size", "--max-memory", "--max-accuracy-drop"}
    assert gates <= set(found[3])


@pytest.fixture
def project(in_tmp: Path) -> Path:
    """A repository as the workflow expects it."""
    for folder in ("models", "data"):
        (in_tmp / folder).mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        torch.save(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), "models/model.pt")
    x = np.random.default_rng(0).normal(size=(256, 1, 8, 8)).astype("float32")
    for name in ("train", "test"):
        np.savez(f"data/{name}.npz", x=x, y=(x.mean(axis=(1, 2, 3)) > 0).astype("int64"))
    (in_tmp / "policy.yaml").write_text("version: 1\ntrain: {steps: 20, batch_size: 16}\n")
    assert load_policy(in_tmp / "policy.yaml").policy.train.steps == 20
    return in_tmp


def keys_of(expression: str) -> set[str]:
    """The top-level paths that a jq expression reads, `.a.b` as `a.b`."""
    outside = re.sub(r'"[^"]*"', "", expression).partition("|")[0]
    return set(re.findall(r"\.([a-z_]+(?:\.[a-z_]+)*)", outside))


def holds(document: dict[str, Any], path: str) -> bool:
    value: Any = document
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def test_the_workflow_runs_and_its_documents_hold_what_is_read(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents: dict[str, dict[str, Any]] = {}
    for words in commands():
        capsys.readouterr()
        assert main(words) == 0, words
        if "--json" in words:
            documents[words[0] + ("-dry" if "--dry-run" in words else "")] = json.loads(capsys.readouterr().out)
    assert (project / "report.html").is_file()
    assert [gate["name"] for gate in documents["convert"]["gates"]] == [
        "strict", "require_layers", "max_memory", "max_accuracy_drop", "max_size",
    ]  # fmt: skip
    assert all(gate["passed"] for gate in documents["convert"]["gates"])
    text = PAGE.read_text(encoding="utf-8")
    reads = re.findall(r"^jq (?:-r )?'(.*)' convert\.json$", text, re.MULTILINE)
    assert len(reads) == 4
    for expression in reads:
        assert keys_of(expression)
        for path in keys_of(expression):
            assert holds(documents["convert"], path), path
    assert {"name", "value", "bound", "passed", "measured"} == set(documents["convert"]["gates"][0])
    assert {"name", "allowed"} <= set(documents["inspect"]["names"][0])


def test_the_page_lists_every_bound() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == ["--strict", "--require-layers", "--max-memory", "--max-size", "--max-accuracy-drop"]
