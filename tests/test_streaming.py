"""The data-free route: which units it chooses, what it writes, and how little memory it takes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from padconvert import ConvertOptions, convert, stream
from padconvert.checkpoint.pieces import Pieces, bytes_of
from padconvert.checkpoint.probe_record import compare_outputs
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.tensor_bytes import view_bytes
from padconvert.checkpoint.write import Hashing
from padconvert.checksum import Checksum
from padconvert.errors import FileError, UsageError, VerificationError
from padconvert.fold import fold_
from padconvert.layers.packed import unpack_bits
from padconvert.layers.paths import shared
from padconvert.load.artefact import load_checkpoint
from padconvert.load.factory import build_factory, put_tensors_
from padconvert.partition import Partitioner, ranking
from padconvert.partition.ranking import keep_in_layer, keep_largest
from padconvert.plan import Plan, read_plan
from padconvert.rewrite import pad_layers, rewrite_


def by_sorting(score_U: Tensor, count: int) -> Tensor:
    """The definition: the highest scores, of equal ones the lowest index."""
    order = torch.sort(score_U, descending=True, stable=True).indices
    return torch.zeros(len(score_U), dtype=torch.bool).index_fill(0, order[:count], True)


VALUES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9, width=16)), min_size=1, max_size=80)


@given(VALUES, st.floats(0, 1), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_a_selection_keeps_what_a_sort_keeps(values: list[float], share: float, dtype: torch.dtype) -> None:
    tensor, count = torch.tensor(values, dtype=dtype), round(share * len(values))
    wanted = by_sorting(tensor.double().abs(), count)
    assert torch.equal(keep_in_layer(tensor.double().abs(), count), wanted)
    assert torch.equal(unpack_bits(keep_largest(tensor, count), len(values)), wanted)


@pytest.mark.parametrize("piece", [8, 64])
@pytest.mark.parametrize("made", ["normal", "rounded", "rising", "zero", "far"])
def test_many_pieces_are_ranked_as_one(made: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's bounds hold, or do not (`far`: it misses the few values that count)."""
    monkeypatch.setattr(ranking, "_PIECE", piece)
    monkeypatch.setattr(ranking, "_SAMPLE", 40)
    noise = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    far = torch.zeros(1003).index_fill(0, torch.arange(1, 1003, 29), 5.0)
    tensor = {"normal": noise, "rounded": noise.round(), "rising": torch.arange(1003.0), "zero": noise * 0, "far": far}
    for count in (0, 1, 17, 334, 1002, 1003):
        kept = unpack_bits(keep_largest(tensor[made], count), 1003)
        assert torch.equal(kept, by_sorting(tensor[made].abs(), count))


def test_pieces_are_the_tensor_and_hashed_in_order() -> None:
    whole = torch.arange(3000.0)
    pieces = Pieces("float32", (3000,), lambda: iter(whole.split(700)))
    assert b"".join(bytes_of(pieces)) == bytes(view_bytes(whole))
    with Hashing() as sha256:
        for data in bytes_of(pieces):
            sha256.update(data)
        assert sha256.hexdigest() == hashlib.sha256(view_bytes(whole)).hexdigest()


class Net(nn.Module):
    """A grouped convolution, one in channels-last memory, a tie, and no bias somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.last = nn.Conv2d(12, 6, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.one = nn.Linear(6, 6)
        self.two = self.one
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.grouped(self.stem(x).relu()).relu()).mean((2, 3))
        out: Tensor = self.out(self.two(self.one(x).tanh()).tanh())
        return out


EVERYTHING = "rules=[{name: 're:.*', convert: true}]"


def converted(tmp_path: Path, granularity: str, **options: object) -> tuple[Net, Path]:
    torch.manual_seed(0)
    source, output = Net(), tmp_path / "out.pad.safetensors"
    torch.save(source, tmp_path / "model.pt")
    given = ConvertOptions(
        output=output,
        granularity=granularity,
        trust=("test_streaming",),
        sets=(EVERYTHING,),
        force=True,
        **options,  # type: ignore[arg-type]
    )
    convert(tmp_path / "model.pt", given)
    return source, output


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_the_file_holds_what_upcycling_and_partition_make(granularity: str, tmp_path: Path) -> None:
    """Built the long way, with all copies in memory, each tensor has the same bits."""
    plan_file = tmp_path / "plan.json"
    source, output = converted(tmp_path, granularity, plan_out=plan_file)
    plan: Plan = read_plan(plan_file)
    model = source.eval()
    rewrite_(model, plan)
    Partitioner(model, plan).round_(1, [])
    wanted = fold_(model).state_dict()
    checkpoint = read_checkpoint(output)
    assert len(pad_layers(model)) == 5
    for name in checkpoint.header.tensors:
        tensor = checkpoint.tensor(name)
        full = wanted[name][:1] if name.endswith("_dynamic") else wanted[name]
        assert torch.equal(tensor, full), name
    assert all(check.passed for check in checkpoint.verify_crc())


def test_a_bad_file_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units written in another order than the index says: the forward from the file shows it."""
    slices = stream._slices
    monkeypatch.setattr(stream, "_slices", lambda values, view, units: slices(values, view, units.flip(0)))
    with pytest.raises(VerificationError, match="does not compute what the source computes"):
        converted(tmp_path, "channel")
    assert not (tmp_path / "out.pad.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_on_the_files_pages_an_artefact_computes_what_it_computes_loaded(granularity: str, tmp_path: Path) -> None:
    source, output = converted(tmp_path, granularity)
    checkpoint, x = read_checkpoint(output), torch.randn(3, 4, 9, 9)
    mapped = load_checkpoint(checkpoint, trust=("test_streaming",), mapped=True)
    loaded = load_checkpoint(checkpoint, trust=("test_streaming",))
    with torch.no_grad():
        wanted = source.eval()(x)
        assert torch.allclose(mapped(x), wanted, atol=1e-6)
        assert torch.allclose(loaded(x), wanted, atol=1e-6)
    for name, layer in pad_layers(mapped).items():
        assert layer.shares_experts
        assert torch.equal(shared.expert(layer, "weight"), source.get_submodule(name).weight)  # type: ignore[arg-type]
        assert not pad_layers(loaded)[name].shares_experts  # to be trained


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tied = nn.Linear(4, 4)
        self.again = self.tied
        nn.init.trunc_normal_(self.tied.weight)
        self.register_buffer("kept", torch.ones(3), persistent=False)


def test_a_factory_fills_no_parameter_and_takes_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    uniform = Tensor.uniform_
    monkeypatch.setattr(Tensor, "uniform_", lambda self, *a, **k: (calls.append("uniform_"), uniform(self, *a, **k))[1])  # type: ignore[func-returns-value]
    given = {name: torch.randn_like(tensor) for name, tensor in Filled().state_dict().items() if tensor.dim()}
    given["again.weight"], given["again.bias"] = given["tied.weight"], given["tied.bias"]
    calls.clear()
    module = build_factory({"ref": "test_streaming:Filled", "args": {}})
    assert calls == []
    put_tensors_(module, given, "here")
    assert module.kept.tolist() == [1, 1, 1]  # type: ignore[operator]
    assert module.tied is module.again
    placed = module.get_parameter("conv.weight")
    assert placed.data_ptr() == given["conv.weight"].data_ptr()  # not a copy
    for name, tensor in given.items():
        assert torch.equal(module.state_dict()[name], tensor)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        out: Tensor = self.last(self.first(x).relu().mean((2, 3)))
        return out


SEEN: list[Tensor] = []


@pytest.mark.parametrize("shape", [None, (3, 9, 9)])
def test_the_source_is_called_once_and_the_file_once(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    """The forward that finds the inputs is the watched one, on the samples of the record, whose outputs it gives."""
    torch.manual_seed(0)
    torch.save(source := Counted(), tmp_path / "model.pt")
    SEEN.clear()
    output = tmp_path / "out.pad.safetensors"
    given = ConvertOptions(output=output, trust=("test_streaming",), sets=(EVERYTHING,), input_shape=shape)
    made = convert(tmp_path / "model.pt", given)
    of_source, of_file = SEEN
    record = read_checkpoint(output).manifest.probe
    assert record is not None
    assert torch.equal(of_source, of_file)
    assert of_source.shape[1:] == (3, *(shape or (3, 32, 32))[1:])
    assert len(of_source) == record.batch == 4
    with torch.no_grad():
        assert compare_outputs(record, [source.eval()(of_source)])[0] == 0
    assert made.equality is not None
    assert (made.equality.method, made.equality.samples) == ("forward", 4)


def test_inputs_that_the_forward_does_not_take_are_refused(tmp_path: Path) -> None:
    torch.save(Counted(), tmp_path / "model.pt")
    given = ConvertOptions(trust=("test_streaming",), sets=(EVERYTHING,), input_shape=(5, 9, 9))
    with pytest.raises(UsageError, match="--input-shape 1,5,9,9: the model's forward does not take it"):
        convert(tmp_path / "model.pt", given)


def test_units_are_measured_alike_in_pieces_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [torch.randn(7, size, generator=torch.Generator().manual_seed(size)) for size in (40_000, 3)]
    wanted = torch.cat(slices, 1).abs().mean(1).double()
    before = torch.get_num_threads()
    found = []
    try:
        for threads, alone in ((1, 2**15 - 1), (2, 2**15 - 1), (2, 8), (1, 10**9)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(stream, "_ALONE", alone)
            found.append(stream._mean_size(slices, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found[0], wanted)
    assert all(torch.equal(each, found[0]) for each in found)


def test_the_disk_has_the_file_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync runs beside the reading back, and what it says counts."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.2), done.append("synced"), sync(file))[2])  # type: ignore[func-returns-value]
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("named"), replace(self, to))[1])  # type: ignore[func-returns-value]
    converted(tmp_path, "channel")
    assert done[:2] == ["synced", "named"]


def test_a_checksum_begun_before_is_the_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 9999)
    assert Checksum(file).value() == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(FileError, match="nowhere: cannot be read"):
        Checksum(tmp_path / "nowhere").value()


_MEASURED = """
import sys, threading, time, torch
from pathlib import Path
from torch import nn
from padconvert import ConvertOptions, convert, stream

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

granularity, width, layers = sys.argv[1], 1536, 10
def run(width, layers):
    torch.save(nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]), "model.pt")
    sets = ("rules=[{name: 're:.*', convert: true}]",)
    convert("model.pt", ConvertOptions(output=Path("out.safetensors"), force=True, granularity=granularity, sets=sets))
run(64, 2)  # what is imported or set up once
before, peak, done = anonymous(), 0, False
torch.save(nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]), "model.pt")
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
import gc; gc.collect()
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
sets = ("rules=[{name: 're:.*', convert: true}]",)
convert("model.pt", ConvertOptions(output=Path("out.safetensors"), force=True, granularity=granularity, sets=sets))
done = True; thread.join()
print(peak - before, 4 * width * width)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own numbers are needed")
@pytest.mark.parametrize("granularity", ["channel", "element"])
def test_memory_is_that_of_a_few_layers(granularity: str, tmp_path: Path) -> None:
    """Ten layers of 9.4 MB, of which the copies alone would take 94 MB, and 470 MB with four experts."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, granularity], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, layer = map(int, done.stdout.split())
    assert grown <= 4 * layer + 40e6
