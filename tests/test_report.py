"""The reports: golden text for the terminal, exact values for JSON, and an HTML page that stands alone."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy.stats import sem

import report_cases as cases
from padconvert.account import card_lines, training_cost, verdict
from padconvert.finetune.evaluate import Judged
from padconvert.neighbours import what_mends
from padconvert.report import json_document, numbers, terminal
from padconvert.report.html import page
from padconvert.report.layers_table import layers_table
from padconvert.report.progress import Bar, shown
from padconvert.report.routers import routers_table
from padconvert.results import COLLAPSED, STARVED, Check, Comparison, LayerResult, Result, Verification
from padconvert.words import Reason
from test_plan import planned

GOLDEN = Path(__file__).parent / "golden"

CASES: dict[str, Result] = {
    "convert_trained": cases.TRAINED,
    "convert_data_free": cases.DATA_FREE,
    "convert_dry_run": cases.DRY_RUN,
    "convert_mixture": cases.MIXTURE,
    "inspect_source": cases.INSPECTED_SOURCE,
    "inspect_blocks": cases.INSPECTED_BLOCKS,
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


def listed(layers: Sequence[LayerResult], **options: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=200).print(layers_table(layers, **options))
    return [re.sub(r" {2,}", "  ", line.rstrip()) for line in text.getvalue().splitlines()]


def test_the_layers_of_a_block_stand_together_in_their_places() -> None:
    lines = listed(cases.BLOCKS[:5])
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "layers.0.attn.q",
        "layers.0.attn.v",
        "layers.0.mlp.gate",
        "├ up",
        "└ down",
    ]
    assert lines[5] == "└ down  Linear 64×192  convert  neuron  0.5  2 of 8  6,144  6,144  ████░░░░"


def test_equal_layers_of_a_large_network_are_one_row_and_counted_all() -> None:
    lines = listed(cases.BLOCKS)
    assert "layers.{0…5}.attn.q  Linear 64×64  attention_static ×6" in lines
    assert sum("mlp.gate" in line for line in lines) == 6  # what differs in its counts is not equal
    assert len(lines) == 1 + 2 + 18 + 1
    assert lines[-1] == "30 layers: 18 convert · 12 static (attention_static 12)"
    assert len(json.loads(json_document.text(cases.MIXTURE))["layers"]) == 30


def test_equal_blocks_are_one_and_missing_numbers_are_seen() -> None:
    lines = listed(cases.PLANNED_BLOCKS)
    assert lines[3:6] == [
        "layers.{0…2,4…5}.mlp.gate  Linear 192×64  convert ×5  neuron  0.5  2 of 8",
        "├ up  Linear 192×64  convert ×5  neuron  0.5  2 of 8",
        "└ down  Linear 64×192  convert ×5  neuron  0.5  2 of 8",
    ]


@pytest.mark.parametrize(
    "other", [{"aliases": ("again",)}, {"weight_shape": (64, 32)}, {"reason": Reason.POLICY_RULE}, {"detail": "so"}]
)
def test_what_is_not_equal_keeps_a_row_of_its_own(other: dict[str, Any]) -> None:
    first = cases.BLOCKS[0]
    layers = [replace(first, name=f"layers.{i}.attn.q", **(other if i == 7 else {})) for i in range(30)]
    lines = listed(layers)
    assert lines[1].startswith("layers.{0…6,8…29}.attn.q  ")
    assert lines[1].endswith(" ×29")
    assert lines[2].startswith("layers.7.attn.q")


def test_a_number_that_differs_later_in_the_name_is_found_and_small_networks_are_left_alone() -> None:
    first = cases.BLOCKS[0]
    layers = [replace(first, name=f"b.{i}.c.{j}.d", weight_shape=(i + 1, 9)) for i in range(3) for j in range(8)]
    assert [line.split("  ")[0] for line in listed(layers)[1:-1]] == [f"b.{i}.c.{{0…7}}.d" for i in range(3)]
    assert len(listed(layers[:23])) == 1 + 23 + 1


def test_a_limit_counts_the_layers_behind_the_rows_that_it_hides() -> None:
    assert "… and 18 more layers: --json and --plan-out list all of them" in listed(cases.BLOCKS, limit=12)
    assert not any("more layers" in line for line in listed(cases.BLOCKS, limit=20))


def test_parameters_that_compute_a_token_stand_under_those_that_are_stored() -> None:
    lines = rendered(cases.MIXTURE).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("active per token"))
    assert lines[at - 2].startswith("parameters")
    assert lines[at].split()[3:] == ["14,762", "14,762", "17,000", "20,300"]
    assert lines[at + 1].split() == ["1.00×", "1.00×", "1.15×", "1.38×"]
    assert "active per token" not in rendered(replace(cases.MIXTURE, layers=cases.LAYERS))
    said = re.sub(r"</?td>", " ", page(cases.MIXTURE))
    assert re.search(r"active per token +14,762 \(1.00×\) +14,762 \(1.00×\) +17,000 \(1.15×\)", said)


def test_routers_are_shown_with_their_marks_and_the_thresholds() -> None:
    text = rendered(cases.MIXTURE, 200)
    assert re.search(r"layers.1.mlp.gate +█▆▆▃▃▃▁ +0.0 % +30.0 % +0.83 +0.20 +2 starved", text)
    assert re.search(r"layers.2.mlp.gate +█▁ +0.0 % +97.0 % +0.06 +0.01 +collapsed", text)
    assert f"less than {STARVED:.0%}".replace("%", " %") in text
    assert f"below {COLLAPSED}" in text
    assert "router of" not in rendered(cases.TRAINED)
    html = page(cases.MIXTURE)
    assert html.count('class="use"') == 3
    assert 'title="expert 1: 97.0 %"' in html
    assert '<span class="warning">collapsed</span>' in html


def test_of_many_routers_those_with_a_mark_are_shown() -> None:
    well, starved = cases.MIXTURE.routers[:2]
    uses = [replace(well, layer=f"r{i}") for i in range(50)] + [replace(starved, layer="last")]
    text = io.StringIO()
    Console(file=text, width=200).print(routers_table(uses, limit=10))
    assert "last " in text.getvalue()
    assert "r8 " in text.getvalue()
    assert "r9 " not in text.getvalue()
    assert "and 41 more" in text.getvalue()


def test_an_artefact_that_goes_on_is_not_called_a_static_source() -> None:
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in rendered(cases.GOES_ON).splitlines()]
    at = lines.index("accuracy  –  93.47 %  –")
    assert lines[at + 1] == "before this run  90.21 %"
    assert "file  –  113 kB  226 kB" in lines
    assert "parameters  14,762  27,210  56,000" in lines
    text = page(cases.GOES_ON)
    assert "<td>accuracy</td><td>–</td><td>93.47 %</td><td>–</td>" in text
    assert "<td>before this run</td><td>–</td><td>90.21 %</td><td>–</td>" in text
    assert "<td>file</td><td>–</td><td>113 kB</td><td>226 kB</td>" in text


def test_the_card_says_what_was_measured_and_of_what() -> None:
    lines = card_lines(cases.MIXTURE.metrics, cases.MIXTURE.routers, "glue/cola")
    assert lines[2] == (
        "matthews on the run's evaluation data: before the conversion -0.0207, static with the same training 0.1101, "
        "this model 0.1234, fully dynamic 0.1302."
    )
    assert "does not make it GLUE's own set" in lines[4]
    assert lines[5] == (
        "Routers: 3, 1 of them collapsed; entropy of the experts' use 0.06 to 1.00 of the highest; 8 experts with less "
        "than 5% of an even share."
    )
    assert not any("GLUE" in line for line in card_lines(cases.MIXTURE.metrics, (), "classification"))
    assert card_lines(None, (), None) == ()


def test_it_is_said_what_the_verdict_is_about() -> None:
    metrics = cases.MIXTURE.metrics
    assert metrics is not None
    about = "the verdict is about accuracy; what is chance in matthews is not estimated"
    assert about in rendered(cases.MIXTURE)
    assert about in page(cases.MIXTURE)
    one = {"loss": 0.1, "mse": 0.1, "pearson": -0.2}
    numbers_only = Comparison(source=one, output=one, static=one)
    text = rendered(replace(cases.MIXTURE, metrics=numbers_only), 200)
    assert "no verdict: what is chance is estimated for accuracy only, not for mse, pearson" in text
    assert "the verdict" not in rendered(cases.TRAINED)
    assert "verdict:" not in rendered(replace(cases.MIXTURE, metrics=replace(numbers_only, static=None)))
    assert page(replace(cases.MIXTURE, metrics=numbers_only)).count("<svg") == 3


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


@pytest.mark.parametrize(
    ("only_output", "only_static", "samples", "said"),
    [
        # (30 − 10) / 202 = 0.099; (42 / 202 − 0.099²) / 202, its root doubled: 0.0627
        (30, 10, 200, "A gain over S: +10.00 points on 200 examples, where ±6.26 is chance."),
        (10, 30, 200, "A loss against S: −10.00 points on 200 examples, where ±6.26 is chance."),
        # the same gain where the two differ on more: (122 / 202 − 0.099²) / 202
        (70, 50, 200, "No gain over S that this evaluation could show: +10.00 points on 200 examples, where ±10.85 is"),
        # all right against all wrong: of two examples that is chance, of twenty it is not
        (2, 0, 2, "No verdict against S: fewer than 20 examples were evaluated, too few to tell."),
        (20, 0, 20, "A gain over S: +100.00 points on 20 examples, where ±17.76 is"),
        (0, 0, 50, "No gain over S that this evaluation could show: +0.00 points on 50 examples, where ±5.44 is"),
    ],
)
def test_a_verdict_knows_chance(only_output: int, only_static: int, samples: int, said: str) -> None:
    """Both are right on what is left of the examples."""
    output, static = torch.ones(2, samples, dtype=torch.float64)
    static[:only_output] = 0
    output[samples - only_static :] = 0
    ours, control = (Judged({"accuracy": float(right_N.mean())}, right_N) for right_N in (output, static))
    assert verdict(ours, control).startswith(said.replace("S", "fine-tuning the static model for the same steps", 1))


def test_after_a_loss_a_verdict_says_what_to_try() -> None:
    worse, better = torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    lost, won = (Judged({"accuracy": float(right_N.mean())}, right_N) for right_N in (worse, better))
    assert verdict(lost, won, "Try.").endswith("is chance. Try.")
    assert "Try" not in verdict(won, lost, "Try.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Try a lower learning rate (--lr, now 0.0003)."),
        (
            {"train__top_probability": 0.9, "train__expert_lr_scale": 4, "train__lr": 0.003},
            "Try routers that start less sure (--set train.top_probability=null), experts that learn as fast as the "
            "rest (--set train.expert_lr_scale=1) or a lower learning rate (--lr, now 0.003).",
        ),
        # null would be surer
        ({"train__top_probability": 0.4}, "Try a lower learning rate (--lr, now 0.0003)."),
        ({"train__expert_lr_scale": 0.5}, "Try a lower learning rate (--lr, now 0.0003)."),
    ],
)
def test_what_to_try_is_what_was_asked_for(settings: dict[str, Any], said: str) -> None:
    assert what_mends(planned(**settings)) == said


def test_an_output_worse_than_its_source_is_warned_of() -> None:
    """38 of 40 against 40 is within chance, 30 is not: (12 / 42 − (10 / 42)²) / 42, its root doubled, is 14.77 %."""
    whole, some, fewer = (torch.ones(40, dtype=torch.float64) for _ in range(3))
    some[:2], fewer[:10] = 0, 0
    source = Judged({"accuracy": 1.0}, whole)
    assert training_cost(Judged({"accuracy": 0.95}, some), source, "Try.") == ""
    assert training_cost(Judged({"accuracy": 0.75}, fewer), source, "Try.") == (
        "The output does worse than its source, untrained: −25.00 points on 40 examples, where ±14.77 is chance. Try."
    )
    assert training_cost(Judged({"accuracy": 0.75}, fewer[:19]), Judged({"accuracy": 1.0}, whole[:19]), "Try.") == ""
    assert training_cost(Judged({"mse": 1.0}), Judged({"mse": 0.5}), "Try.") == ""


def test_a_verdicts_chance_is_that_of_pairs() -> None:
    """Twice the standard error that SciPy gives of the differences, one example more for either side among them."""
    generator = torch.Generator().manual_seed(0)
    output, static = (torch.rand(400, generator=generator).double().round(decimals=1) for _ in range(2))
    apart = [*(output - static).tolist(), 1.0, -1.0]
    said = verdict(Judged({"accuracy": 0.5}, output), Judged({"accuracy": 0.5}, static))
    assert f"±{200 * sem(apart, ddof=0):.2f} is chance" in said


def test_no_verdict_without_a_control_or_class_labels() -> None:
    values = Judged({"mse": 0.5})
    assert verdict(values, values) == verdict(Judged({"accuracy": 1.0}, torch.ones(30)), None) == ""
