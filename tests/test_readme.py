"""The documents' examples are run: every `python` and `console` block of README, tutorial and CI page.

A shown line must be a line of the output, where `…` stands for anything. `$ echo $?` shows the exit code before it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines shown under it) of a console block."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *shown = part.rstrip("\n").split("\n")
        yield command, [line for line in shown if line.strip()]


def pattern(line: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(piece) for piece in line.split("…")))


def follow(block: str, folder: Path) -> None:
    exit_code = 0
    for command, shown in commands(block):
        if command == "echo $?":
            assert [str(exit_code)] == shown
            continue
        done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
        exit_code = done.returncode
        lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
        fails = any(line.startswith("error: ") for line in shown)
        assert (exit_code != 0) == fails, f"$ {command}\n" + "\n".join(lines)
        for line in shown:
            assert any(pattern(line).fullmatch(found) for found in lines), f"{line!r} is not in\n" + "\n".join(lines)


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md", "docs/ci.md"])
def test_the_examples_of_a_document_hold(document: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert len(blocks) > 2
    for language, block in blocks:
        if language == "console":
            follow(block, tmp_path)
        else:
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=ENVIRONMENT, check=True)


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{document} points at {target}"


def test_readme_lists_every_exit_code() -> None:
    from padconvert import errors

    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PadconvertError)
    ]
    assert sorted(map(int, rows)) == sorted({0, *(kind.exit_code for kind in kinds)})


def test_errors_page_lists_every_reason() -> None:
    from padconvert.words import Reason

    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", text, re.MULTILINE) == [(r.value, r.explanation) for r in Reason]
