"""`padconvert bench`: the paired timer by a fake clock, the networks, the command; and the benchmarks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import padconvert
from benchmarks import bounds, copying, made, nets, report, rows
from benchmarks.convolutions import shapes
from benchmarks.paper import PaperConv2d, in_the_papers_form
from padconvert import bench as benching
from padconvert.__main__ import main
from padconvert.bench import BenchOptions, bench
from padconvert.checkpoint.read import read_checkpoint
from padconvert.contenders import FULL, OUTPUT, STATIC, bytes_of, fully_dynamic, make_unequal_
from padconvert.errors import FileError, UsageError
from padconvert.layers.conv import PadConv2d
from padconvert.paired import Effort, Paired, Spread, measure
from padconvert.progress import Silent
from padconvert.report import terminal
from padconvert.results import Bench, BenchBatch, BenchLayer
from padconvert.rewrite import pad_layers

# ---- the paired timer --------------------------------------------------------------------------------------------


class Clock:
    """Time passes only inside calls; `log` says who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def work() -> None:
            self.log.append(name)
            self.now += next(seconds)

        return work


def seconds_of(*times: float) -> Iterator[float]:
    yield from times


def test_calls_take_turns_after_every_one_was_warmed_up() -> None:
    clock = Clock()
    calls = {name: clock.call(name, seconds_of(*[1.0] * 9)) for name in "ABC"}
    heard: list[tuple[int, int]] = []
    found = measure(calls, Effort(3, 3, 0.0, warm_up=2), clock=clock, done=lambda *round_: heard.append(round_))
    assert "".join(clock.log) == "AABBCC" + "ABC" * 3
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert (found.rounds, found.finished) == (3, True)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down in the middle changes the seconds, not the ratios."""
    clock = Clock()
    base = clock.call("A", seconds_of(9.0, 1.0, 10.0, 100.0, 1.0, 1.0))
    other = clock.call("B", seconds_of(9.0, 2.0, 20.0, 200.0, 3.0, 4.0))
    found = measure({"A": base, "B": other}, Effort(5, 5, 0.0, warm_up=1), clock=clock)
    assert found.seconds == {"A": (1.0, 10.0, 100.0, 1.0, 1.0), "B": (2.0, 20.0, 200.0, 3.0, 4.0)}
    assert found.ratio("B", "A") == Spread(2.0, 2.0, 3.0)
    assert found.spread("A") == Spread(1.0, 1.0, 10.0)
    assert found.spread("B").median / found.spread("A").median == 4.0  # what it would be otherwise


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    calls = {"short": clock.call("s", seconds_of(*[0.004] * 99)), "long": clock.call("l", seconds_of(*[0.5] * 9))}
    found = measure(calls, Effort(2, 2, 0.0, warm_up=1), clock=clock)
    assert "".join(clock.log) == "sl" + "sssl" * 2
    assert found.seconds["short"] == pytest.approx((0.004, 0.004))


def test_time_runs_out_after_the_least_rounds() -> None:
    clock = Clock()
    calls = {"A": clock.call("A", seconds_of(*[1.0] * 99))}
    assert measure(calls, Effort(50, 4, 2.5, warm_up=1), clock=clock).rounds == 4
    assert measure(calls, Effort(50, 2, 5.5, warm_up=1), clock=clock).rounds == 6


def interrupting(clock: Clock, name: str, after: int) -> Callable[[], None]:
    def times() -> Iterator[float]:
        yield from [1.0] * after
        raise KeyboardInterrupt

    return clock.call(name, times())


def test_an_interrupt_keeps_the_rounds_that_are_whole() -> None:
    clock = Clock()
    calls = {"A": clock.call("A", seconds_of(*[1.0] * 9)), "B": interrupting(clock, "B", after=3)}
    found = measure(calls, Effort(9, 9, 0.0, warm_up=1), clock=clock)
    assert (found.rounds, found.finished) == (2, False)
    assert {len(times) for times in found.seconds.values()} == {2}
    with pytest.raises(KeyboardInterrupt):
        measure({"A": interrupting(clock, "A", after=1)}, Effort(9, 9, 0.0, warm_up=1), clock=clock)


def test_a_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no round"):
        Paired({"A": (), "B": ()}).ratio("A", "B")


# ---- the networks ------------------------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1, groups=2), nn.ReLU()]
    convs += [nn.Conv2d(12, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)]
    return nn.Sequential(*convs, nn.ReLU(), nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_the_fully_dynamic_network_computes_the_same_with_every_unit_dynamic(granularity: str) -> None:
    x = torch.randn(5, 3, 8, 8)
    model = made.network(small(), x, granularity).double()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    full = fully_dynamic(model)
    layers = pad_layers(full)
    assert set(layers) == set(pad_layers(model)) == {"2", "4", "7"}
    for layer in layers.values():
        assert [getattr(layer, f"{part}_static") for part in layer.parts] == [None] * len(layer.parts)
    with torch.no_grad():
        torch.testing.assert_close(full(x.double()), model(x.double()), atol=1e-10, rtol=0)
        assert (full(x.double()) - small().double()(x.double())).abs().max() > 1e-3  # experts are unequal
    assert bytes_of(full) > 1.5 * bytes_of(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_a_mixture_of_hidden_units_becomes_fully_dynamic_too(gated: bool) -> None:
    torch.manual_seed(0)
    model = made.mixture(made.Ffn(6, 10, gated)).double()
    full = fully_dynamic(model)
    x = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(full(x), model(x), atol=1e-10, rtol=0)
    units = [len(layer.units("weight").dynamic) for layer in pad_layers(full).values()]
    assert units == [10] * len(units)
    assert {len(layer.units("weight").dynamic) for layer in pad_layers(model).values()} == {5}


def test_only_equal_experts_are_moved_apart() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = made.network(small(), x, "element")
    kept = copy.deepcopy(model.state_dict())
    assert make_unequal_(model) == 0
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    first = pad_layers(model)["2"].weight_dynamic
    assert first is not None
    with torch.no_grad():
        first[:] = first[:1]
    assert make_unequal_(model) == 1
    assert bool((first[1:] != first[:1]).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not say")
def test_the_peak_of_a_call_is_what_it_holds_at_once() -> None:
    """In a process of its own: what an allocator keeps of earlier tests would be counted too."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("the system does not say")
    assert 31 * 2**20 < int(done.stdout) < 40 * 2**20


PEAK = """
import torch
from padconvert.contenders import peak_bytes

def call():
    big = torch.ones(32 * 2**20 // 4)
    del big
    return float(torch.ones(8 * 2**20 // 4).sum())

print(peak_bytes(call, torch.device("cpu")))
"""


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def artefact(in_tmp: Path) -> Path:
    torch.save(small(), "model.pt")
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "other.pt")
    padconvert.convert("model.pt", padconvert.ConvertOptions(input_shape=(3, 8, 8)))
    return in_tmp / "model.pad.safetensors"


QUICK = ["--quick", "--batch-size", "1", "--batch-size", "3"]


def test_a_bench_is_one_document_of_finite_ratios(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", artefact.name, "--against", "model.pt", *QUICK, "--layers", "--json", "--threads", "1"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["complete"], found["dtype"]) == ("padconvert.bench/1", True, "float32")
    assert found["inputs"] == {"0": [3, 8, 8]}
    assert set(found["machine"]) == {"device", "cores", "threads", "vectors", "torch", "python"}
    assert (found["machine"]["device"], found["machine"]["threads"]) == ("cpu", 1)
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        assert batch["static"]["over_static"] == batch["static"]["over_static_low"] == 1.0
        assert batch["rounds"] >= 3
        for name in ("static", "output", "fully_dynamic"):
            timed = batch[name]
            assert timed["seconds_low"] <= timed["seconds"] <= timed["seconds_high"]
            assert 0 < timed["over_static_low"] <= timed["over_static"] <= timed["over_static_high"] < math.inf
        assert 0 < batch["output_over_fully_dynamic"] < math.inf
    assert [layer["name"] for layer in found["layers"]] == ["2", "4", "7"] * 2
    assert all(0 < layer["over_static"] < math.inf for layer in found["layers"])
    assert [bool(layer["path"]) for layer in found["layers"]] == [True, True, False] * 2  # a linear layer has one
    assert found["bytes_static"] < found["bytes_output"] < found["bytes_fully_dynamic"]
    assert found["bytes_static"] == 4 * sum(p.numel() for p in small().parameters())
    assert found["notes"] == ["its experts were still equal: they were moved apart before timing"]


def test_inputs_come_from_data_too(artefact: Path) -> None:
    np.savez("data.npz", x=np.zeros((2, 3, 6, 6), "float32"), y=np.arange(2))
    options = BenchOptions(batch_sizes=(3,), quick=True, data=("data.npz",))
    assert bench(artefact, Path("model.pt"), options).inputs == {"0": (3, 6, 6)}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--against", "other.pt"], 4, "is not the file that model.pad.safetensors was made from"),
        (["--against", "absent.pt"], 4, "absent.pt"),
        ([], 2, "--against"),
        (["--against", "model.pt", "--batch-size", "0"], 2, "--batch-size 0"),
        (["--against", "model.pt", "--threads", "0"], 2, "--threads 0"),
        (["--against", "model.pt", "--input-shape", "1,7,8,8"], 4, "cannot be called with these inputs"),
        (["--against", "model.pt", "--input-shape", "1,3,8,8", "--data", "d.npz"], 2, "name one of them"),
        (["--against", "model.pt", "--device", "nowhere"], 2, "--device nowhere"),
    ],
)
@pytest.mark.usefixtures("artefact")
def test_what_cannot_be_measured_is_said_in_one_line(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "model.pad.safetensors", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_an_artefact_without_inputs_asks_for_them(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_probe(path: Path) -> object:
        checkpoint = read_checkpoint(path)
        checkpoint.manifest = dataclasses.replace(checkpoint.manifest, probe=None)
        return checkpoint

    monkeypatch.setattr(benching, "read_checkpoint", without_probe)
    with pytest.raises(FileError, match=r"holds no inputs .* Name them: --input-shape 1,3,224,224 or --data"):
        bench(artefact, Path("model.pt"))
    options = BenchOptions(batch_sizes=(2,), quick=True, input_shape=(3, 6, 6))
    assert bench(artefact, Path("model.pt"), options).inputs == {"0": (3, 6, 6)}


def test_layers_tell_where_no_source_was_recorded(in_tmp: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    padconvert.save(made.network(small(), x, "channel"), "saved.st", inputs=x)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "other.pt")
    torch.save(small(), "model.pt")
    with pytest.raises(FileError, match="has no layer '2' of shape"):
        bench(in_tmp / "saved.st", Path("other.pt"))
    found = bench(in_tmp / "saved.st", Path("model.pt"), BenchOptions(batch_sizes=(1,), quick=True))
    assert found.notes == ()  # its experts are unequal


class Interrupting(Silent):
    """A Ctrl-C as the second batch size begins."""

    def stage(self, name: str) -> None:
        if name == "batch of 3":
            raise KeyboardInterrupt


def interrupted(artefact: Path) -> Bench:
    options = BenchOptions(batch_sizes=(1, 3), quick=True)
    return bench(artefact, Path("model.pt"), options, Interrupting())


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_shows_what_was_measured(
    artefact: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = interrupted(artefact)
    assert (found.complete, [batch.batch_size for batch in found.batches]) == (False, [1])
    monkeypatch.setattr(benching, "bench", lambda *_: found)
    assert main(["bench", artefact.name, "--against", "model.pt", *(["--json"] if as_json else [])]) == 130
    captured = capsys.readouterr()
    assert captured.err == "error: interrupted; above is what was measured until then\n"
    if as_json:
        assert json.loads(captured.out)["complete"] is False  # one document, not another for the error
    else:
        assert "batch of 1" in captured.out


def test_an_interrupt_before_anything_is_measured_has_nothing_to_show(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> Paired:
        raise KeyboardInterrupt

    monkeypatch.setattr(benching, "measure", interrupt)
    assert main(["bench", artefact.name, "--against", "model.pt"]) == 130
    assert capsys.readouterr().err == "error: interrupted before anything was measured\n"


def test_a_batch_that_does_not_fit_is_a_note_and_the_others_stay(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(given: object, *rest: object, **named: object) -> Paired:
        sizes.append(1)
        if len(sizes) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return measure(given, *rest, **named)  # type: ignore[arg-type]

    sizes: list[int] = []
    monkeypatch.setattr(benching, "measure", too_large)
    found = bench(artefact, Path("model.pt"), BenchOptions(batch_sizes=(1, 3), quick=True))
    assert [batch.batch_size for batch in found.batches] == [1]
    assert found.notes[-1] == "batch of 3: there is not enough memory"


def test_threads_are_as_asked_and_then_as_before(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noting(*given: object, **named: object) -> Paired:
        seen.append(torch.get_num_threads())
        return measure(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(benching, "measure", noting)
    before = torch.get_num_threads()
    found = bench(artefact, Path("model.pt"), BenchOptions(batch_sizes=(1,), threads=2, quick=True))
    assert (seen, found.machine.threads, torch.get_num_threads()) == ([2], 2, before)
    with pytest.raises(UsageError, match="--threads -1"):
        BenchOptions(threads=-1)


def test_the_terminal_says_each_ratio_with_its_spread() -> None:
    seconds = {STATIC: (0.010, 0.010, 0.010), OUTPUT: (0.011, 0.012, 0.015), FULL: (0.022, 0.024, 0.030)}
    paired = Paired(seconds)
    timed = {name: benching.timed_of(paired, name, 2_000_000) for name in seconds}
    batch = BenchBatch(8, 3, timed[STATIC], timed[OUTPUT], timed[FULL], paired.ratio(OUTPUT, FULL).median)
    layer = BenchLayer("a.b", 8, "conv2d", (8, 4, 3, 3), "channel", 0.001, 0.0015, 0.004, 1.5, 4.0, "rows")
    result = Bench(
        "m.pad.st", "m.pt", benching.machine(torch.device("cpu"), 2), "float32", {"0": (3, 8, 8)}, 1000, 2000, 4000,
        (batch,), (layer,),
    )  # fmt: skip
    text = io.StringIO()
    terminal.show(result, Console(file=text, width=120, highlight=False))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "batch of 8 10.0 ms 12.0 ms 24.0 ms 0.50×" in lines
    assert "3 rounds 1.00× 1.20× (1.15–1.35) 2.40× (2.30–2.70)" in lines
    assert "memory of a call +2.00 MB +2.00 MB +2.00 MB" in lines
    assert "tensors 1.00 kB 2.00 kB 4.00 kB 0.50×" in lines
    assert "a.b 8×4×3×3 1.00 ms 1.50 ms 1.50× 4.00× rows" in lines


# ---- the benchmarks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "count"), [(nets.resnet18, 11_689_512), (nets.resnet50, 25_557_032), (nets.mobilenet_v2, 3_504_872)]
)
def test_the_networks_have_the_published_sizes(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        net = make()
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("granularity", ["element", "channel"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "bias": False}, {"dilation": 2}])
def test_the_papers_form_has_our_layers_values(granularity: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options).double().eval()  # type: ignore[arg-type]
    model = made.convolution(conv, granularity)
    paper = in_the_papers_form(model)
    x = torch.randn(5, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(paper(x), model(x), atol=1e-10, rtol=0)
        assert (paper(x) - conv(x)).abs().max() > 1e-3
    layer = model[0]
    assert isinstance(layer, PadConv2d)
    assert isinstance(paper[0], PaperConv2d)  # type: ignore[index]
    assert int(paper[0].mask_KOI.sum()) == 4 * len(layer.units("weight").dynamic) * layer.view("weight").size  # type: ignore[index]


def test_the_shapes_are_those_of_both_resnets() -> None:
    found = shapes()
    assert len(found) == len(set(found)) == 28
    assert {shape.kernel for shape in found} == {1, 3}
    assert {shape.size for shape in found} == {7, 14, 28, 56}


def given(folder: Path) -> rows.Setting:
    return rows.setting(["--quick", "--results", str(folder), "--threads", "1"])


def test_a_row_is_taken_once_until_the_code_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[str] = []

    def take() -> rows.Row:
        taken.append("row")
        return rows.paired_row(Paired({"static": (1.0, 2.0), "ours": (3.0, 6.0)}), ("static",))

    for _ in range(2):
        row = rows.Table("trial", given(tmp_path), ["tests/benchmarks/rows.py"]).row("a", take)
        assert row["over"] == {"static": {"ours": [3.0, 3.0, 3.0]}}
    assert taken == ["row"]
    rows.Table("trial", given(tmp_path), ["tests/benchmarks/nets.py"]).row("a", take)
    assert taken == ["row", "row"]
    kept = json.loads((tmp_path / "quick" / "trial.json").read_text())
    assert set(kept) == {"machine", "command", "code", "rows"}
    assert "ours 3.00×" in capsys.readouterr().out


def test_a_table_of_another_dtype_has_a_file_and_a_command_of_its_own(tmp_path: Path) -> None:
    words = ["--results", str(tmp_path), "--dtype", "bfloat16", "--threads", "1"]
    table = rows.Table("trial", rows.setting(words), [])
    assert (table.path.name, table.command) == ("trial-bfloat16.json", "python -m benchmarks.trial --dtype bfloat16")
    assert table.path.parent == tmp_path


def test_an_interrupted_row_is_not_kept(tmp_path: Path) -> None:
    table = rows.Table("trial", given(tmp_path), [])
    unfinished = Paired({"static": (1.0,)}, finished=False)
    with pytest.raises(KeyboardInterrupt):
        table.row("a", lambda: rows.paired_row(unfinished, ()))
    assert not table.path.exists()


def results() -> dict[str, dict[str, object]]:
    """Of one table: a ResNet-50 that meets one bound and misses another."""
    times = {"static": (1.0, 1.0), "channel": (1.1, 1.1), "element": (2.0, 2.0), "paper": (8.0, 8.0)}
    row = rows.paired_row(Paired(times), ("static", "paper"), batch=1, pixels=224)
    machine = {"device": "cpu", "cores": 2, "vectors": "AVX2", "threads": 2, "torch": "2.13", "python": "3.11"}
    whole = {"machine": machine, "command": "python -m benchmarks.networks", "code": ""}
    return {"networks": {**whole, "rows": {"ResNet-50, B 1": {"net": "ResNet-50", **row}}}}


def test_bounds_are_held_against_what_was_measured() -> None:
    found = {each.what: each for each in bounds.held({"networks": results()["networks"]["rows"]})}  # type: ignore[dict-item]
    channel, element = (found[f"ResNet-50, `{name}`, B 1, over static"] for name in ("channel", "element"))
    assert (channel.measured, channel.at_most, channel.met) == (1.1, 1.2, True)
    assert (element.measured, element.at_most, element.met) == (2.0, 1.6, False)
    assert found["ResNet-50, `element`, over the paper's form, geometric mean"].measured == pytest.approx(0.25)
    assert sum(each.met is None for each in found.values()) == len(found) - 3


def test_the_page_says_bounds_ratios_and_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report.document(results())
    assert "| ResNet-50, `channel`, B 1, over static | 1.2× | 1.1× | met |" in text
    assert "| ResNet-50, `element`, B 1, over static | 1.6× | 2× | **missed** |" in text
    assert "| ResNet-50, B 1 | 1000.0 | 1.10 (1.10–1.10) | 2.00 (2.00–2.00) |" in text
    assert "cpu, 2 cores (AVX2), 2 threads, torch 2.13" in text
    drawn = report.chart(results()["networks"]["rows"])  # type: ignore[arg-type]
    assert "ResNet-50, B 1" in drawn
    assert drawn == report.chart(results()["networks"]["rows"])  # type: ignore[arg-type]
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 700, 1000, 1900])
def test_the_floor_of_a_conversion_writes_as_many_bytes_as_the_output(tmp_path: Path, size: int, threads: int) -> None:
    source = bytes(range(250)) * 4
    (tmp_path / "source").write_bytes(source)
    found = copying.copy(tmp_path / "source", tmp_path / "target", size, threads)
    written = (tmp_path / "target").read_bytes()
    assert written == (source * 2)[:size]
    assert found == tuple(hashlib.sha256(data).hexdigest() for data in (source, written))


def test_drawn_units_are_an_exact_count() -> None:
    assert [int(made.drawn(units, 0.3).sum()) for units in (1, 2, 10, 65)] == [1, 1, 3, 20]
    assert torch.equal(made.drawn(10, 0.3), made.drawn(10, 0.3))


def test_a_mixture_computes_the_dense_block_while_its_experts_are_equal() -> None:
    torch.manual_seed(0)
    dense = made.Ffn(6, 10, True).double()
    model = made.mixture(dense)
    x: Tensor = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        assert (model(x) - dense(x)).abs().max() > 1e-4
        for layer in pad_layers(model).values():
            assert layer.weight_dynamic is not None
            weight = dense.get_submodule(next(n for n, m in model.named_modules() if m is layer)).weight
            assert isinstance(weight, Tensor)
            cut = layer.view("weight").cut_full(weight)
            for name, units in (("static", layer.units("weight").static), ("dynamic", layer.units("weight").dynamic)):
                stored = getattr(layer, f"weight_{name}")
                stored.copy_(layer.view("weight").as_packed(cut[units]).expand_as(stored))
        torch.testing.assert_close(model(x), dense(x), atol=1e-10, rtol=0)
