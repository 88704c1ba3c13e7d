"""Bounds of a run: held before the work where the plan can, before the file gets its name where only it can."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from padconvert.__main__ import main
from padconvert.checkpoint.read import read_checkpoint
from padconvert.convert import convert
from padconvert.errors import GateError, UsageError
from padconvert.finetune.evaluate import Judged
from padconvert.gates import accuracy_gate, hold, layers_gate, memory_gate, parse_size, size_gate
from padconvert.load import least_memory
from padconvert.load.opened import Opened
from padconvert.options import ConvertOptions
from padconvert.plan import Plan, make_plan, read_plan
from padconvert.plan.memory import least_file_bytes, peak_memory
from padconvert.policy import load_policy, set_overrides
from padconvert.report.html import page
from padconvert.report.terminal import show
from padconvert.results import Gate
from padconvert.walk import walk
from report_cases import TRAINED

MODULE = "gatesdata"
STEPS = ("--steps", "10", "--batch-size", "8", "-q")
OLD = b"yesterday"


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        ).eval()  # fmt: skip


@pytest.fixture
def here(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(net(), "model.pt")
    random = np.random.RandomState(0)
    x, y = random.randn(64, 1, 8, 8).astype("float32"), random.randint(0, 3, 64)
    y[:3] = range(3)
    np.savez("data.npz", x=x, y=y)
    np.savez("unlabelled.npz", x=x)
    np.savez("values.npz", x=x, y=random.randn(64, 3).astype("float32"))
    (in_tmp / f"{MODULE}.py").write_text("def train():\n    open('canary', 'w')\n")
    (in_tmp / "out.st").write_bytes(OLD)
    monkeypatch.syspath_prepend(str(in_tmp))
    return in_tmp


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON document, stderr) of a conversion to out.st, which is there already."""
    capsys.readouterr()
    code = main(["convert", "model.pt", "-o", "out.st", "--force", "--json", *words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def gate(name: str, value: float, bound: float, passed: bool, measured: str) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": bound, "passed": passed, "measured": measured}


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the experts' copies may not be made."""

    def never(*_: object) -> None:
        raise AssertionError("the K copies were made")

    monkeypatch.setattr(Opened, "dynamic_copy", never)


# sizes as words


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000), ("12B", 12), ("25MB", 25_000_000), ("1.5GiB", 1_610_612_736), ("2kib", 2048),
        ("0.3 kB", 300), ("4TB", 4 * 10**12), (" 1KIB ", 1024), ("1.0005kB", 1000),
    ],
)  # fmt: skip
def test_a_size(text: str, size: int) -> None:
    assert parse_size("--max-size", text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e6", "1,5GB", "25M", "12 parsecs", "nan", "0", "0.5", "inf", "٣"])
def test_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--max-memory "):
        parse_size("--max-memory", text)


@pytest.mark.parametrize(
    "bound",
    [
        {"max_accuracy_drop": -0.1}, {"max_accuracy_drop": 1.1}, {"max_accuracy_drop": float("nan")}, {"max_size": 0},
        {"max_memory": -5}, {"require_layers": 0},
    ],
)  # fmt: skip
def test_a_bound_that_nothing_could_be_held_against(bound: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(bound)).replace("_", "-")):
        ConvertOptions(**bound)


# pure


def test_a_bound_is_met_when_the_value_equals_it() -> None:
    assert size_gate(100, 100)[0].passed
    assert not size_gate(101, 100)[0].passed
    assert memory_gate(7, 7)[0].passed
    assert not memory_gate(8, 7)[0].passed
    assert layers_gate(2, 2)[0].passed
    assert not layers_gate(1, 2)[0].passed
    # 0.9 − 0.8 is 0.09999999999999998, 0.9 − 0.7 is 0.20000000000000007
    for output, bound in ((0.8, 0.1), (0.7, 0.2)):
        assert accuracy_gate({"accuracy": 0.9}, {"accuracy": output}, bound)[0].passed
    assert not accuracy_gate({"accuracy": 0.9}, {"accuracy": 0.7}, 0.1999)[0].passed
    assert accuracy_gate({"accuracy": 0.5}, {"accuracy": 0.6}, 0.0)[0].passed
    assert size_gate(5, None) == layers_gate(5, None) == memory_gate(5, None) == accuracy_gate({}, {}, None) == ()


def test_every_missed_bound_is_named_at_once() -> None:
    gates = (*layers_gate(1, 2), *size_gate(5, 9), *memory_gate(2_000, 1_000))
    with pytest.raises(GateError, match=r"--require-layers: layers converted 1 \(at least 2\); --max-memory: .*2,000"):
        hold(gates)
    assert hold(gates[1:2]) == gates[1:2]


# each gate, met and not


def test_the_size_of_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys=capsys)
    size = document["output"]["bytes"]
    assert code == 0
    assert size == len((here / "out.st").read_bytes())
    assert document["gates"] == []
    code, document, _ = run("--max-size", str(size), capsys=capsys)
    assert (code, document["gates"]) == (0, [gate("max_size", size, size, True, "file_bytes")])
    written = (here / "out.st").read_bytes()
    # the plan cannot know the header: one byte too many is found in the file, and the file of before stays
    code, document, said = run("--max-size", str(size - 1), capsys=capsys)
    assert (code, document["exit_code"], said.count("\n")) == (8, 8, 1)
    assert f"--max-size: bytes of the file {size:,} (at most {size - 1:,})" in said
    assert document["gates"] == [gate("max_size", size, size - 1, False, "file_bytes")]
    assert (here / "out.st").read_bytes() == written
    assert list(here.glob(".padconvert-*")) == []


def test_a_size_that_the_plan_exceeds_is_refused_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--data", "data.npz", *STEPS)
    _, dry, _ = run("--dry-run", *data, capsys=capsys)
    planned = dry["totals"]["bytes_output"]
    refuse_work(monkeypatch)
    code, document, said = run("--max-size", str(planned - 1), *data, capsys=capsys)
    assert (code, document["gates"]) == (8, [gate("max_size", planned, planned - 1, False, "tensor_bytes")])
    words = (
        f"--max-size: at least {planned:,} bytes of tensors, header not counted (at most {planned - 1:,} in the file)"
    )
    assert words in said
    assert run("--max-size", "1kB", "--dry-run", capsys=capsys)[0] == 8
    code, document, _ = run("--max-size", str(planned), "--dry-run", *data, capsys=capsys)
    assert (code, document["gates"]) == (0, [])  # whether the header fits is open, and said to be
    note = f"decided by the written file: it will have at least {planned:,} bytes of tensors, and a header comes on top"
    assert f"--max-size {planned:,} is {note}" in document["notes"]
    assert not any("--max-size" in note for note in dry["notes"])
    assert (here / "out.st").read_bytes() == OLD


def test_the_number_of_layers(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, document, _ = run("--require-layers", "2", capsys=capsys)
    assert (code, document["gates"][0]) == (0, gate("require_layers", 2, 2, True, "layers"))
    (here / "out.st").write_bytes(OLD)
    refuse_work(monkeypatch)
    code, document, said = run("--require-layers", "3", capsys=capsys)
    assert (code, document["gates"][0]["value"]) == (8, 2)
    assert "--require-layers: layers converted 2 (at least 3)" in said
    assert (here / "out.st").read_bytes() == OLD


def test_memory(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, document, _ = run("--max-memory", "1GB", capsys=capsys)
    free = document["gates"][0]["value"]
    assert (code, document["gates"]) == (0, [gate("max_memory", free, 10**9, True, "estimated_bytes")])
    assert run("--max-memory", str(free), capsys=capsys)[0] == 0
    (here / "out.st").write_bytes(OLD)
    refuse_work(monkeypatch)
    code, document, said = run("--max-memory", str(free - 1), capsys=capsys)
    assert (code, document["gates"][0]["value"]) == (8, free)
    assert (
        f"bytes of memory, estimated {free:,} (at most {free - 1:,}; weights, gradients, optimizer state, scor" in said
    )
    size = 4 * sum(p.numel() for p in net().parameters())
    # `padconvert.convert` is the function of that name
    monkeypatch.setattr(sys.modules["padconvert.convert"], "open_input", lambda *_: pytest.fail("it was opened"))
    code, document, said = run("--max-memory", str(size - 1), capsys=capsys)
    assert (code, document["gates"]) == (8, [gate("max_memory", size, size - 1, False, "source_bytes")])
    assert f"the source's tensors alone take {size:,} bytes of memory (at most {size - 1:,})" in said
    assert (here / "out.st").read_bytes() == OLD


def test_what_lies_unread_beside_the_model_is_no_memory(here: Path) -> None:
    """An optimizer, and a view of one row of a large storage: they are in the file, and nobody holds them."""
    module, big = net(), torch.randn(10_000, 8)
    module[0].register_buffer("row", big[3])
    size = 4 * (sum(p.numel() for p in module.parameters()) + 8)
    for legacy in (False, True):
        torch.save({"model": module, "optimizer": {"state": {0: torch.randn(10_000)}, "param_groups": []}},
                   here / "model.pt", _use_new_zipfile_serialization=not legacy)  # fmt: skip
        assert least_memory(here / "model.pt") == size < (here / "model.pt").stat().st_size // 10
    module[2].register_buffer("again", big[3])
    module[2].weight = nn.Parameter(module[2].weight.half())  # type: ignore[arg-type]
    save_file({"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(2, 2)}, here / "model.safetensors")
    assert least_memory(here / "model.safetensors") == 3 * 2 + 4 * 4
    torch.save(module, here / "model.pt")
    assert least_memory(here / "model.pt") == size + 32 - module[2].weight.numel() * 2


def test_accuracy(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what was measured: the training here gains or loses as the test says."""
    data = ("--data", "data.npz", "--eval-data", "data.npz", *STEPS)
    scores = iter([])  # type: ignore[var-annotated]
    monkeypatch.setattr(
        "padconvert.finetune.train.judge", lambda *_, **__: Judged({"accuracy": next(scores), "loss": 1.0})
    )
    scores = iter([0.75, 0.74])
    code, document, _ = run("--max-accuracy-drop", "0.01", *data, capsys=capsys)
    assert code == 0
    assert document["gates"] == [gate("max_accuracy_drop", pytest.approx(0.01), 0.01, True, "accuracy")]  # type: ignore[arg-type]
    (here / "out.st").write_bytes(OLD)
    scores = iter([0.75, 0.5])
    code, document, said = run("--max-accuracy-drop", "0.2", "--require-layers", "1", *data, capsys=capsys)
    assert (code, said.count("error:")) == (8, 1)
    assert "--max-accuracy-drop: accuracy lost 0.2500 (at most 0.2). Nothing was written." in said
    assert [(gate["name"], gate["passed"]) for gate in document["gates"]] == [
        ("require_layers", True), ("max_accuracy_drop", False),
    ]  # fmt: skip
    assert (here / "out.st").read_bytes() == OLD


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing is trained"),
        ("--data data.npz --set data.holdout=0", "nothing is held out"),
        ("--data values.npz", "not classes"),
        ("--data data.npz --eval-data unlabelled.npz", "no labels"),
        ("--data unlabelled.npz --set data.augment=[flip]", "no labels"),
    ],
)
def test_an_accuracy_that_nothing_can_measure_is_refused_before_any_work(
    words: str, said: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_work(monkeypatch)
    steps = STEPS if words else ()
    code, document, _ = run("--max-accuracy-drop", "0.5", *words.split(), *steps, capsys=capsys)
    assert code == 2
    assert "--max-accuracy-drop" in document["error"]
    assert said in document["error"]
    assert (here / "out.st").read_bytes() == OLD


@pytest.mark.parametrize("asked", ["--compare", "--set train.compare=true"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data data.npz --set data.holdout=0", "nothing is held out"),
        ("--data data.npz --eval-data unlabelled.npz", "no labels"),
        ("--data unlabelled.npz --set data.augment=[flip]", "no labels"),
    ],
)
def test_a_comparison_of_nothing_is_refused_before_any_work(
    words: str, said: str, asked: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_work(monkeypatch)
    code, document, _ = run(*asked.split(), *words.split(), *STEPS, capsys=capsys)
    assert code == 2
    assert "--compare: " in document["error"]
    assert said in document["error"]
    assert (here / "out.st").read_bytes() == OLD


# strict


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--arch nets:net", ["--arch nets:net"]),
        ("--trust a --trust b.c", ["--trust a", "--trust b.c"]),
        (f"--data {MODULE}:train", [f"--data {MODULE}:train"]),
        (f"--data data.npz --eval-data {MODULE}:train", [f"--eval-data {MODULE}:train"]),
        (f"--set data.train={MODULE}:train", [f"--set data.train={MODULE}:train"]),
        ("--policy policy.yaml --trust a", ["--trust a", f"policy.yaml:2 {MODULE}:train"]),
    ],
)
def test_strict_refuses_every_word_that_runs_code(
    words: str, named: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "policy.yaml").write_text(f"version: 1\ndata: {{train: ['{MODULE}:train']}}\n")
    code, document, _ = run("--strict", *words.split(), capsys=capsys)
    assert code == 2
    assert document["error"].startswith("--strict: refuses ")
    assert document["error"].removeprefix("--strict: refuses ").partition(", which runs")[0].split(", ") == named
    assert (here / "out.st").read_bytes() == OLD
    assert not (here / "canary").exists()


def test_strict_takes_plain_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / f"{MODULE}:train").mkdir()  # a folder of that name is data, and no function
    code, document, _ = run("--strict", "--data", "data.npz", *STEPS, capsys=capsys)
    assert (code, document["gates"]) == (0, [gate("strict", 0, 0, True, "options")])
    assert run("--strict", "--data", f"{MODULE}:train", *STEPS, capsys=capsys)[0] == 4
    assert not (here / "canary").exists()


# the plan's arithmetic


def planned(module: nn.Module, *settings: str, route: Any = "trained") -> Plan:
    said = set_overrides(settings)
    tensors = {name: (tuple(t.shape), t.element_size()) for name, t in module.state_dict().items()}
    return make_plan(walk(module), load_policy(overrides=said), route=route, seed=0, tensors=tensors)


def test_the_estimate_of_memory_is_the_documented_sum() -> None:
    """Its letters: S, S', F, F₁, I, R, G. The real memory of real runs is in test_memory.py."""
    module = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 40), nn.Linear(40, 2))
    plan = planned(module)
    source = 4 * sum(p.numel() for p in module.parameters())
    entries = [10 * 20, 20 * 30, 30 * 40]
    full, one, index = plan.cost.bytes_fully_dynamic, 4 * 4 * entries[2], 8 * sum(entries)
    assert [entry.info.name for entry in plan.converted] == ["0", "1", "2"]
    weights = 3 * source + full + index + 3 * full  # the teacher; gradients and AdamW's two moments
    moments = {
        "step": full + 2 * one, "scoring": full + 12 * one + index, "ranking": index + 11 * index, "evaluation": one,
    }  # fmt: skip
    assert peak_memory(plan, train_samples=64) == math.ceil(4 / 3 * (weights + max(moments.values())))
    assert max(moments, key=lambda moment: moments[moment]) == "scoring"
    sgd = planned(module, "train.optimizer=sgd")
    assert peak_memory(plan) - peak_memory(sgd) == pytest.approx(4 / 3 * full, abs=1)
    task = planned(module, "train.objective=task")
    assert peak_memory(plan) - peak_memory(task) == pytest.approx(4 / 3 * source, abs=1)
    assert peak_memory(planned(module, route="data-free")) == 2 * source + 4 * one // 4 + 48_000_000  # of 4 experts
    part = planned(module, "train.what=converted")
    assert peak_memory(plan) - peak_memory(part) == pytest.approx(4 / 3 * 3 * plan.cost.bytes_untouched, abs=1)
    half = planned(nn.Sequential(*module).half())
    assert peak_memory(plan) - peak_memory(half) == pytest.approx(4 / 3 * source / 2, abs=1)
    many = planned(nn.Sequential(*(nn.Linear(30, 30) for _ in range(40))))
    index = 8 * 39 * 900
    held = 3 * many.cost.bytes_source + 4 * many.cost.bytes_fully_dynamic + index
    assert peak_memory(many) == math.ceil(4 / 3 * (held + 12 * index))  # the ranking


def test_convolutions_build_a_weight_for_every_sample_of_a_batch() -> None:
    plan = planned(net())
    one = 16 * 8 * 9 * 4  # bytes of either of the two converted weights
    without, most = peak_memory(plan, train_samples=1), peak_memory(plan, train_samples=10_000, eval_samples=0)
    batch = plan.policy.train.batch_size
    step = plan.cost.bytes_fully_dynamic + 2 * 4 * one + batch * (2 * one + 2 * one)
    scoring = plan.cost.bytes_fully_dynamic + 12 * 4 * one + 2 * one * 2
    assert most - without == pytest.approx(4 / 3 * (step - scoring), abs=1)
    assert peak_memory(plan, train_samples=1, eval_samples=10_000) - without == pytest.approx(
        4 / 3 * (4 * one + 2 * 256 * one - scoring), abs=1
    )


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_no_file_is_smaller_than_the_plan_says_it_must_be(granularity: str, seed: str, here: Path) -> None:
    options = ConvertOptions(
        output=here / "out.st", force=True, granularity=granularity, seed=int(seed), data=("data.npz",), steps=5,
        batch_size=8, dynamic_ratio=0.4, sets=("partition.score=random",), plan_out=here / f"{seed}{granularity}.json",
    )  # fmt: skip
    totals = convert(here / "model.pt", options).totals
    assert options.plan_out is not None
    least = least_file_bytes(read_plan(options.plan_out))
    found = totals.bytes_output - totals.bytes_header
    assert totals.bytes_source // 2 < least <= found
    assert granularity == "channel" or least == found


def test_memory_that_two_buffers_share_is_counted_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two views of the same bytes are stored once: a bound between both sums must not be refused early."""
    module = net()
    table = torch.randn(1000, 8)
    module[0].register_buffer("one", table)
    module[2].register_buffer("two", table.view(1000, 8))
    torch.save(module, here / "model.pt")
    code, document, _ = run(capsys=capsys)
    size, totals = document["output"]["bytes"], document["totals"]
    assert code == 0
    _, dry, _ = run("--dry-run", capsys=capsys)
    assert dry["totals"]["bytes_output"] - (size - totals["bytes_header"]) == 32_000
    assert size < dry["totals"]["bytes_output"]
    assert run("--max-size", str(size), capsys=capsys)[0] == 0


# reports


def test_reports_show_every_bound(capsys: pytest.CaptureFixture[str]) -> None:
    gates = (
        Gate("max_size", 113_480, 120_000, True, "file_bytes"),
        Gate("max_accuracy_drop", -0.0326, 0.01, True, "accuracy"),
    )
    result = replace(TRAINED, gates=gates)
    show(result)
    out = capsys.readouterr().out
    for words in ("bytes of the file 113,480 (at most 120,000)", "accuracy lost -0.0326 (at most 0.01)"):
        assert f"✓ bound {words}" in out
        assert f"Bound, passed: {words}." in page(result)
    assert "Bound" not in page(TRAINED)


def test_from_python_bounds_are_numbers(here: Path) -> None:
    result = convert(here / "model.pt", ConvertOptions(output=here / "new.st", max_size=10**6, require_layers=1))
    assert [gate.name for gate in result.gates] == ["require_layers", "max_size"]
    assert result.gates[1].value == read_checkpoint(here / "new.st").header.file_size
