"""The documents' examples are run: every `python` and `console` block of README, tutorial and CI page.

A shown line must be a line of the output, where `…` stands for anything. `$ echo $?` shows the exit code before it.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TRANSFORMER = "\n## A transformer\n"  # the tutorial's last part
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


def follow_all(text: str, folder: Path) -> None:
    blocks = BLOCK.findall(text)
    assert len(blocks) > 2
    for language, block in blocks:
        if language == "console":
            follow(block, folder)
        else:
            subprocess.run([sys.executable, "-c", block], cwd=folder, env=ENVIRONMENT, check=True)


def parts(document: str) -> tuple[str, str]:
    """What needs no transformers, and the rest."""
    first, _, rest = (ROOT / document).read_text(encoding="utf-8").partition(TRANSFORMER)
    return first, rest


@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md", "docs/ci.md"])
def test_the_examples_of_a_document_hold(document: str, tmp_path: Path) -> None:
    follow_all(parts(document)[0], tmp_path)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with a tiny random BERT's directory, a tokenizer of invented words in it, and two tables of text."""
    pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{number}" for number in range(50)]
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(numbers), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    chance = random.Random(0)
    for name, count in (("train.tsv", 64), ("dev.tsv", 32)):
        rows = [chance.choices(words, k=chance.randint(3, 9)) for _ in range(count)]
        lines = [f"{' '.join(row)}\t{'good' if row[0] < 'w3' else 'bad'}" for row in rows]
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *lines, ""]), encoding="utf-8")
    return tmp_path


def test_the_tutorials_transformer_holds(texts: Path) -> None:
    follow_all(parts("docs/tutorial.md")[1], texts)


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
