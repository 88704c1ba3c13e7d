"""The reports: golden text for the terminal, exact values for JSON, and an HTML page that stands alone."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import report_cases as cases
from padconvert.report import json_document, numbers, terminal
from padconvert.report.html import page
from padconvert.report.layers_table import layers_table
from padconvert.report.progress import Bar, shown
from padconvert.results import Check, Result, Verification

GOLDEN = Path(__file__).parent / "golden"

CASES: dict[str, Result] = {
    "convert_trained": cases.TRAINED,
    "convert_data_free": cases.DATA_FREE,
    "convert_dry_run": cases.DRY_RUN,
    "inspect_source": cases.INSPECTED_SOURCE,
    "inspect_artefact": cases.INSPECTED_ARTEFACT,
    "verify": cases.VERIFIED,
    "doctor": cases.DIAGNOSED,
}


def rendered(result: Result, width: int = 100) -> str:
    text = io.StringIO()
    terminal.show(result, Console(file=text, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_terminal_report_is_the_golden_one(name: str) -> None:
    """`PADCONVERT_GOLDEN=write` writes the files anew: read them before committing."""
    path = GOLDEN / f"{name}.txt"
    text = rendered(CASES[name])
    if os.environ.get("PADCONVERT_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_both_neighbours_stand_beside_the_result() -> None:
    text = rendered(cases.TRAINED)
    header = next(line for line in text.splitlines() if "static source" in line)
    assert header.split("   ")[0] == ""
    assert header.index("static source") < header.index("padconvert") < header.index("fully dynamic")
    accuracy = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert re.findall(r"[\d.]+ %", accuracy) == ["90.21 %", "91.82 %", "93.47 %", "93.61 %"]


def test_data_free_report_says_so_before_any_number() -> None:
    lines = rendered(cases.DATA_FREE).splitlines()
    assert "Nothing was trained" in "".join(lines[:3])
    assert "Nothing was trained" not in rendered(cases.TRAINED)


def test_a_broken_promise_is_marked() -> None:
    assert cases.TRAINED.equality is not None
    broken = replace(cases.TRAINED, equality=replace(cases.TRAINED.equality, passed=False, max_rel_diff=0.5))
    assert "✗ same function before training: max|Δ| = 5.0e-01" in rendered(broken)


def test_a_long_table_keeps_the_converted_layers_and_counts_the_rest() -> None:
    static, converted = cases.LAYERS[0], cases.LAYERS[1]
    layers = [replace(static, name=f"s{i}") for i in range(50)] + [replace(converted, name="last", aliases=())]
    text = io.StringIO()
    Console(file=text, width=100).print(layers_table(layers, limit=10))
    lines = text.getvalue().splitlines()
    assert any(line.startswith("last ") for line in lines)
    assert sum(line.startswith("s") and "stem_static" in line for line in lines) == 9
    assert "… and 41 more layers" in text.getvalue()
    assert "51 layers: 1 convert · 50 static (stem_static 50)" in text.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_json_document_reads_back(name: str) -> None:
    document = json.loads(json_document.text(CASES[name]))
    assert next(iter(document)) == "schema"
    assert document["schema"] == f"padconvert.{name.partition('_')[0]}/1"


def test_json_document_of_a_conversion_has_the_promised_keys() -> None:
    document = json.loads(json_document.text(cases.TRAINED))
    assert document["source"] == {"path": "model.pt", "kind": "module", "bytes": 61_204, "sha256": "a" * 64}
    assert document["output"]["sha256"] == "b" * 64
    assert document["totals"]["bytes_fully_dynamic"] == 226_100
    third = document["layers"][1]
    assert (third["name"], third["aliases"], third["verdict"], third["n_dynamic"]) == (
        "3",
        ["again.3"],
        "convert",
        1382,
    )
    assert document["layers"][0]["reason"] == "stem_static"
    assert document["equality"]["tolerance"] == 1e-5
    assert document["metrics"]["output"]["accuracy"] == 0.9347
    assert document["route"] == "trained"
    assert json.loads(json_document.text(cases.DRY_RUN))["output"] is None


def test_json_holds_no_number_that_json_has_not() -> None:
    assert cases.TRAINED.equality is not None
    strange = replace(cases.TRAINED, equality=replace(cases.TRAINED.equality, max_abs_diff=math.inf))
    assert json.loads(json_document.text(strange))["equality"]["max_abs_diff"] is None


class Links(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.outside.append(value)


def parsed(text: str) -> Links:
    links = Links()
    links.feed(text)
    return links


def test_html_page_stands_alone_and_shows_the_numbers() -> None:
    text = page(cases.TRAINED)
    found = parsed(text)
    assert found.outside == []
    assert "script" not in found.tags
    assert found.tags.count("svg") == 3  # sizes, accuracy, loss
    for said in ("93.47 %", "93.61 %", "27,210 (1.84×)", "2.4e-07", cases.TRAINED.metrics.verdict):  # type: ignore[union-attr]
        assert said in text
    assert page(cases.TRAINED) == text


def test_html_page_escapes_names() -> None:
    layer = replace(cases.LAYERS[1], name="<script>alert(1)</script>")
    text = page(replace(cases.TRAINED, layers=(layer,), warnings=("<img src=x>",)))
    assert not {"script", "img"} & set(parsed(text).tags)


def test_html_page_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    text = page(cases.TRAINED)
    assert parsed(text).tags.count("svg") == 0
    assert 'pip install "padconvert[report]"' in text
    assert "93.47 %" in text


def test_progress_is_silent_off_a_terminal_and_when_quiet() -> None:
    for quiet, is_terminal in ((False, False), (True, True)):
        text = io.StringIO()
        with shown(quiet=quiet, console=Console(file=text, force_terminal=is_terminal)) as progress:
            progress.stage("train")
            progress.step(1, 10, loss=0.5)
            progress.note("a note")
        assert text.getvalue() == ""


def test_progress_on_a_terminal_shows_stage_steps_and_numbers() -> None:
    text = io.StringIO()
    with shown(console=Console(file=text, force_terminal=True, width=120)) as progress:
        assert isinstance(progress, Bar)
        progress.note("a note")
        progress.stage("train")
        progress.step(3, 10, loss=0.51234)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    assert all(said in plain for said in ("a note", "train", "3/10", "loss 0.5123"))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (61_204, "61.2 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (4_200_000_000, "4.20 GB"), (3 * 10**15, "3000 TB")],
)  # fmt: skip
def test_sizes(value: int, said: str) -> None:
    assert numbers.size(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "░░░░"), (0.001, "█░░░"), (0.5, "██░░"), (0.999, "███░"), (1.0, "████")]
)
def test_bars_are_empty_and_full_only_at_the_ends(value: float, said: str) -> None:
    assert numbers.bar(value, 4) == said


def test_sparkline_follows_the_values() -> None:
    assert numbers.sparkline([0.0, 7.0], 10) == "▁█"
    assert numbers.sparkline(list(range(80)), 8) == "▁▂▃▄▅▆▇█"
    assert numbers.sparkline([2.0, 2.0, 2.0], 3) == "▁▁▁"
    assert numbers.sparkline([], 5) == ""


def test_metrics_in_their_own_units() -> None:
    assert numbers.metric("accuracy", 0.9347) == "93.47 %"
    assert numbers.metric("loss", 0.2001) == "0.2001"
    assert numbers.seconds(0.42) == "0.4 s"
    assert numbers.seconds(200) == "3 min 20 s"


def test_what_was_only_measured_is_no_check_that_passed() -> None:
    measured = Check("accuracy", True, 0.9, None, "measured; nothing to hold it against", held=False)
    text = rendered(Verification("a.st", (Check("loads", True, None, None), measured), True))
    assert "· accuracy: 0.9; measured; nothing to hold it against" in text
    assert text.endswith("\nall 1 check passed\n")
    assert json.loads(json_document.text(Verification("a.st", (measured,), True)))["checks"][0]["held"] is False


def test_recorded_hashes_are_no_limits() -> None:
    checks = (Check("source sha256", True, "017a", "017a"), Check("source sha256", False, "ffff", "017a", "no"))
    text = rendered(Verification("a.st", checks, False))
    assert "✓ source sha256: 017a (as recorded)" in text
    assert "✗ source sha256: ffff (recorded: 017a); no" in text


def test_a_dry_run_names_its_plan() -> None:
    assert "the plan (saved as plan.json); no artefact was written" in rendered(cases.DRY_RUN)
    assert "the plan; no artefact was written" in rendered(replace(cases.DRY_RUN, plan_file=None))
    assert "the plan (saved as plan.json)" in page(cases.DRY_RUN)


def test_files_and_tensors_are_told_apart() -> None:
    said = page(cases.TRAINED)
    assert "<td>tensor bytes</td><td>59.0 kB (1.00×)</td>" in said
    assert "<td>file</td><td>61.2 kB (1.00×)</td>" in said
    assert "<td>file</td><td>61.2 kB (1.00×)</td><td>–</td><td>–</td>" in page(cases.DRY_RUN)


@pytest.mark.parametrize("width", [80, 90, 100, 200])
def test_long_names_break_at_their_dots(width: int) -> None:
    name = "transformer.encoder.layers.11.attention.output.dense_projection"
    layer = replace(cases.LAYERS[1], name=name, aliases=(f"shared.{name}",))
    lines = [
        line.split("  ")[0].rstrip() for line in rendered(replace(cases.TRAINED, layers=(layer,)), width).splitlines()
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith("transformer"))
    end = next(i for i, line in enumerate(lines) if "1 layer: 1 convert" in line)
    assert "".join(lines[start:end]) == f"{name}= shared.{name}"
    assert all(line.endswith((".", "dense_projection")) for line in lines[start:end])
    assert (end - start == 2) == (width == 200)


def test_off_a_terminal_no_line_is_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    note = "word " * 60 + "end"
    terminal.show(replace(cases.TRAINED, notes=(note,)))
    assert f"· {note}" in capsys.readouterr().out.splitlines()


def test_a_partition_that_keeps_everything_is_no_course() -> None:
    assert "partition  100 → 55 → 30 % dynamic" in rendered(cases.TRAINED)
    whole = replace(cases.TRAINED, history=({"step": 1, "ratio": 1.0}, {"step": 2, "ratio": 1.0}))
    assert "partition" not in rendered(whole)
