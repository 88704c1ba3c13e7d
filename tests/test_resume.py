"""`--work-dir`: a run killed at any moment goes on to the same bytes, and a changed or damaged one is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import padconvert.finetune.resume
from padconvert import ConvertOptions, convert
from padconvert.__main__ import main
from padconvert.errors import FileError, Interrupted, UsageError
from padconvert.finetune.resume import FileKeeper, WorkDir
from padconvert.progress import Silent
from padconvert.results import Conversion

STEPS = 20  # 4 of warm-up, rounds before the steps 6, 8, 10, 12 and 14, then recovery
TRAIN = (f"train.steps={STEPS}", "train.batch_size=8", "partition.batches=2", "partition.micro_batch=8")
SGD = ("train.optimizer=sgd", "train.lr=0.05")
MLP = ("defaults.router=mlp", "defaults.scales=none", "partition.score=fisher", "partition.scope=layer")
VARIANTS: dict[str, dict[str, Any]] = {
    "element_sgd": {"sets": [*TRAIN, *SGD]},
    "channel_adamw": {
        "sets": [*TRAIN, "train.optimizer=adamw", "train.lr=0.01", "defaults.granularity=channel"],
        "seed": 3,
    },
    "mlp_fisher_constant": {
        "sets": [*TRAIN, *MLP, *SGD, "train.schedule=constant", "train.what=converted"],
    },
    "distilled": {"sets": [*TRAIN, *SGD, "train.objective=distill", "data.augment=[crop,flip]"]},
    "compared": {"sets": [*TRAIN, "train.optimizer=adamw", "train.lr=0.01"], "compare": True},
}


def at(stage: str, step: int = 0) -> dict[str, Any]:
    return {"stage": stage, "step": step}


#: variant, and the moments at which it is killed one after the other
KILLS: dict[str, tuple[str, list[Any]]] = {
    "before the first step": ("element_sgd", [at("train")]),
    "in the warm-up": ("element_sgd", [at("train", 3)]),
    "between rounds": ("element_sgd", [at("train", 7)]),
    "at a round, then in recovery": ("element_sgd", [at("train", 8), at("train", 17)]),
    "after the last step": ("element_sgd", [at("train", STEPS)]),
    "before writing": ("element_sgd", [at("write")]),
    "while writing": ("element_sgd", ["write"]),
    "in half of a save": ("element_sgd", [{"save": 9, "whole": False}]),
    "before a save has its name": ("element_sgd", [{"save": 9, "whole": True}]),
    "in half of the first save": ("element_sgd", [{"save": 1, "whole": False}]),
    "channel, before the first round": ("channel_adamw", [at("train", 6)]),
    "channel, between rounds": ("channel_adamw", [at("train", 9)]),
    "channel, in recovery": ("channel_adamw", [at("train", 16)]),
    "mlp router, in the warm-up": ("mlp_fisher_constant", [at("train", 2)]),
    "mlp router, between rounds": ("mlp_fisher_constant", [at("train", 11)]),
    "distilled, between rounds": ("distilled", [at("train", 11)]),
    "compared, in the static control": ("compared", [at("train the static control", 5)]),
    "compared, in the dynamic control": ("compared", [at("train the fully dynamic control", 12)]),
    "compared, in the output": ("compared", [at("train", 13)]),
}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source and data."""
    folder = tmp_path_factory.mktemp("resume")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(nn.Sequential(*Net().eval()), folder / "model.pt")
    x = np.random.RandomState(0).randn(96, 1, 8, 8).astype("float32")
    np.savez(folder / "data.npz", x=x, y=np.random.RandomState(1).randint(0, 3, 96))
    return folder


def options_of(place: Path, variant: str, output: Path, **more: Any) -> ConvertOptions:
    given = {**VARIANTS[variant], **more, "data": (str(place / "data.npz"),), "output": output, "force": True}
    return ConvertOptions(**{**given, "sets": tuple(given["sets"])})


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> dict[str, bytes]:
    """Every variant's artefact of a run in one go, without a work directory."""
    for variant in VARIANTS:
        convert(place / "model.pt", options_of(place, variant, place / f"{variant}.st"))
    return {variant: (place / f"{variant}.st").read_bytes() for variant in VARIANTS}


@pytest.fixture(scope="module")
def killed(place: Path, uninterrupted: dict[str, bytes]) -> dict[str, list[int]]:
    """All killed runs, forked by one process after a whole run of its own; wait statuses by the kill's name."""

    def job(variant: str, folder: Path, moment: Any) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        (folder / "out.st").write_bytes(b"an artefact of yesterday")
        paths = {"output": str(folder / "out.st"), "work_dir": str(folder / "work")}
        options = {**VARIANTS[variant], **paths, "data": [str(place / "data.npz")], "force": True}
        return {"source": str(place / "model.pt"), "options": options, "kill": moment}

    jobs = [job("element_sgd", place / "whole", None)]
    jobs += [job(variant, place / name, moment) for name, (variant, moments) in KILLS.items() for moment in moments]
    (place / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, script, place / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (place / "whole" / "out.st").read_bytes() == uninterrupted["element_sgd"]
    statuses = iter(json.loads(done.stdout))
    return {name: [next(statuses) for _ in moments] for name, (_, moments) in KILLS.items()}


class Steps(Silent):
    """The first step of every stage that this process did itself."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}
        self.now = ""

    def stage(self, name: str) -> None:
        self.now = name

    def step(self, done: int, total: int, **numbers: float) -> None:
        del total, numbers
        self.first.setdefault(self.now, done)


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, place: Path, uninterrupted: dict[str, bytes], killed: dict[str, list[int]]
) -> None:
    variant, moments = KILLS[name]
    assert [os.WTERMSIG(status) for status in killed[name]] == [signal.SIGKILL] * len(moments)
    output = place / name / "out.st"
    assert output.read_bytes() == b"an artefact of yesterday"
    steps = Steps()
    options = options_of(place, variant, output, work_dir=place / name / "work")
    convert(place / "model.pt", options, steps)
    assert output.read_bytes() == uninterrupted[variant]
    match moments[-1]:
        case {"stage": str(stage), "step": int(step)} if step > 1:
            assert steps.first[stage] == step  # it went on: the step it was killed in, and none before
        case {"save": int(number)}:
            assert steps.first["train"] == number
        case "write" | {"stage": "write"}:
            assert steps.first == {}  # nothing is trained twice


def test_the_controls_of_a_resumed_run_are_those_of_an_uninterrupted_one(place: Path, tmp_path: Path) -> None:
    results: list[Conversion] = []
    for work_dir in (None, tmp_path / "work", tmp_path / "work"):
        options = options_of(place, "compared", tmp_path / "out.st", work_dir=work_dir)
        results.append(convert(place / "model.pt", options))
    first = results[0].metrics
    assert first is not None
    assert first.static
    assert first.fully_dynamic
    assert [(r.metrics, r.history) for r in results[1:]] == [(first, results[0].history)] * 2


# ---- changed or damaged ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The work directory of a finished run."""
    work_dir = place / "finished"
    convert(place / "model.pt", options_of(place, "element_sgd", place / "finished.st", work_dir=work_dir))
    return work_dir


@pytest.fixture
def work_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "work")


def test_it_may_be_said_elsewhere(place: Path, work_dir: Path, tmp_path: Path) -> None:
    """The same settings, by other options: the same run, of which nothing is left to do."""
    sets = [each for each in VARIANTS["element_sgd"]["sets"] if "train." not in each or "optimizer" in each]
    options = options_of(
        place, "element_sgd", tmp_path / "out.st", work_dir=work_dir, sets=sets, steps=STEPS, batch_size=8, lr=0.05
    )
    steps = Steps()
    convert(place / "model.pt", options, steps)
    assert steps.first == {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"lr": 0.04}, "train.lr: 0.05 before, 0.04 now"),
        ({"dynamic_ratio": 0.5}, 'defaults.dynamic_ratio: "0.3" before, "0.5" now'),
        ({"sets": [*VARIANTS["element_sgd"]["sets"], "partition.rounds=3"]}, "partition.rounds: 5 before, 3 now"),
        ({"experts": 2, "granularity": "channel"}, 'defaults.granularity: "element" before, "channel" now; '),
    ],
)
def test_a_changed_run_is_refused_and_told_what_changed(
    changed: dict[str, Any], said: str, place: Path, work_dir: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in work_dir.iterdir()}
    options = options_of(place, "element_sgd", tmp_path / "out.st", work_dir=work_dir, **changed)
    with pytest.raises(UsageError) as caught:
        convert(place / "model.pt", options)
    assert said in str(caught.value)
    assert f"{work_dir} belongs to another run" in str(caught.value)
    assert not (tmp_path / "out.st").exists()
    assert {path.name: path.read_bytes() for path in work_dir.iterdir()} == before


def test_another_source_other_data_and_other_threads_are_refused(
    place: Path, work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(place, "element_sgd", tmp_path / "out.st", work_dir=work_dir)
    torch.manual_seed(1)  # the source's own seed is 0
    torch.save(nn.Sequential(*Net().eval()), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="source sha256"):
        convert(tmp_path / "model.pt", options)
    with np.load(place / "data.npz") as arrays:
        np.savez(tmp_path / "data.npz", x=arrays["x"], y=2 - arrays["y"])
    renamed = [("data.train", str(place / "data.npz")), ("data.train", str(tmp_path / "data.npz"))]
    terms = json.loads((work_dir / "run.json").read_text())
    assert terms["data.train"] == [renamed[0][1]]
    (work_dir / "run.json").write_text(json.dumps({**terms, "data.train": [renamed[1][1]]}))
    with pytest.raises(UsageError, match=r"data: \"[0-9a-f]{56}\.\.\. before"):
        convert(place / "model.pt", replace(options, data=(str(tmp_path / "data.npz"),)))
    (work_dir / "run.json").write_text(json.dumps(terms))
    with monkeypatch.context() as patch:
        patch.setattr("padconvert.__version__", "9.9")
        with pytest.raises(UsageError, match=r'padconvert: "[0-9.]+" before, "9.9" now'):
            convert(place / "model.pt", options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(UsageError, match="threads: 1 before, 7 now"):
        convert(place / "model.pt", options)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("output.safetensors", lambda data: data[: len(data) // 2]),
        ("output.safetensors", lambda data: b""),  # noqa: ARG005
        ("output.safetensors", lambda data: flip(data, len(data) - 100)),
        ("output.safetensors", lambda data: flip(data, len(data) // 2)),
        ("run.json", lambda data: data[:-20]),
        ("run.json", lambda data: b"[]"),  # noqa: ARG005
        ("run.json", lambda data: b"\xff\xfe"),  # noqa: ARG005
    ],
)
def test_a_damaged_state_is_an_error_with_the_way_on(
    name: str, damage: Any, place: Path, work_dir: Path, tmp_path: Path
) -> None:
    path = work_dir / name
    path.write_bytes(damage(path.read_bytes()))
    options = options_of(place, "element_sgd", tmp_path / "out.st", work_dir=work_dir)
    with pytest.raises(FileError, match=r"again") as caught:
        convert(place / "model.pt", options)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "out.st").exists()


def test_a_flipped_bit_anywhere_in_a_state_is_found(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the header every byte, of the tensors one in a hundred; the step and the history are in the header."""
    restored: list[str] = []

    def note(_: object, record: dict[str, Any], stored: dict[str, torch.Tensor], __: object) -> None:
        restored.append(json.dumps(record) + str({name: stored[name].tolist() for name in sorted(stored)}))

    monkeypatch.setattr(padconvert.finetune.resume, "_restore", note)
    path = work_dir / "output.safetensors"
    keeper, whole = FileKeeper(path, cast(Any, None)), path.read_bytes()
    keeper.restore_(cast(Any, None))
    header = 8 + int.from_bytes(whole[:8], "little")
    assert b'\\"step\\": 20' in whole[:header]
    for place in (*range(header), *range(header, len(whole), 100)):
        path.write_bytes(flip(whole, place))
        with contextlib.suppress(FileError):
            keeper.restore_(cast(Any, None))
    assert set(restored) == {restored[0]}  # what was restored at all was the same


def test_a_state_of_another_network_is_damaged(place: Path, work_dir: Path, tmp_path: Path) -> None:
    shutil.copy(work_dir / "output.safetensors", tmp_path / "other.safetensors")
    convert(place / "model.pt", options_of(place, "channel_adamw", tmp_path / "c.st", work_dir=tmp_path / "channel"))
    shutil.copy(tmp_path / "channel" / "output.safetensors", work_dir / "output.safetensors")
    with pytest.raises(FileError, match="cannot be read"):
        convert(place / "model.pt", options_of(place, "element_sgd", tmp_path / "out.st", work_dir=work_dir))


def test_a_state_that_cannot_be_saved_is_an_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(padconvert.finetune.resume, "save_file", full)
    options = options_of(place, "element_sgd", tmp_path / "out.st", work_dir=tmp_path / "work")
    with pytest.raises(FileError, match="No space left on device"):
        convert(place / "model.pt", options)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


def interrupt_at(stage: str, step: int) -> type[Silent]:
    class Interrupting(Steps):
        def step(self, done: int, total: int, **numbers: float) -> None:
            super().step(done, total, **numbers)
            if (self.now, done) == (stage, step):
                raise KeyboardInterrupt

        def stage(self, name: str) -> None:
            super().stage(name)
            if (name, 0) == (stage, step):
                raise KeyboardInterrupt

    return Interrupting


@pytest.mark.parametrize(("stage", "step"), [("load", 0), ("plan", 0), ("rewrite", 0), ("train", 9), ("write", 0)])
def test_ctrl_c_says_how_to_go_on_and_the_same_call_does(
    stage: str, step: int, place: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padconvert.finetune.resume, "SAVE_EVERY", 0.0)
    (tmp_path / "out.st").write_bytes(b"yesterday")
    options = options_of(place, "element_sgd", tmp_path / "out.st", work_dir=tmp_path / "work")
    with pytest.raises(Interrupted) as caught:
        convert(place / "model.pt", options, interrupt_at(stage, step)())
    assert str(tmp_path / "work") in str(caught.value)
    assert (tmp_path / "out.st").read_bytes() == b"yesterday"
    assert {path.name for path in tmp_path.iterdir()} <= {"out.st", "work"}
    convert(place / "model.pt", options)
    assert (tmp_path / "out.st").read_bytes() == uninterrupted["element_sgd"]


def test_ctrl_c_on_the_command_line_is_130(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("padconvert.finetune.loop.set_lr_", interrupted)
    words = ["convert", str(place / "model.pt"), "-o", str(tmp_path / "out.st"), "--json"]
    words += ["--data", str(place / "data.npz"), "--steps", "20"]
    assert main(words) == 130
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--work-dir DIR" in captured.err
    assert json.loads(captured.out)["exit_code"] == 130
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_share_a_work_directory(tmp_path: Path) -> None:
    hold = "import sys; from padconvert.finetune.resume import WorkDir; from pathlib import Path\n"
    hold += "kept = WorkDir(Path(sys.argv[1]), {'seed': 0}); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "work")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run is using it"):
            WorkDir(tmp_path / "work", {"seed": 0})
        other.communicate("")
    WorkDir(tmp_path / "work", {"seed": 0})


class SignalAt(Silent):
    """Sends this process a signal while step `at` is reported; notes the first step it hears of."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        self.at, self.number, self.first = at, number, 0

    def step(self, done: int, total: int, **numbers: float) -> None:
        del total, numbers
        self.first = self.first or done
        if self.at == done:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_at_its_step_and_goes_on_there(
    place: Path, uninterrupted: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    """Well before the first periodic save."""
    options = options_of(place, "element_sgd", tmp_path / "out", work_dir=tmp_path / "work")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"step 7 of \d+ is saved"):
        convert(place / "model.pt", options, SignalAt(7, number))
    assert signal.getsignal(number) == before
    again = SignalAt(0)
    convert(place / "model.pt", options, again)
    assert again.first == 8
    assert (tmp_path / "out").read_bytes() == uninterrupted["element_sgd"]


@pytest.mark.parametrize("memory", ["plain", "transposed", "channels last"])
def test_a_fused_optimizers_state_comes_back_as_its_parameter_lies(memory: str) -> None:
    """The state on the disk is in plain order; the fused step goes through memory, whatever the order."""
    value = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    if memory == "transposed":
        value = value.transpose(0, 1)
    elif memory == "channels last":
        value = value.to(memory_format=torch.channels_last)
    ends = []
    for interrupted in (False, True):
        parameter = nn.Parameter(value.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for step in range(4):
            parameter.grad = torch.cos(parameter.detach() * 7 + step)
            optimizer.step()
            if interrupted:
                stored = {key: each.clone().contiguous() for key, each in optimizer.state[parameter].items()}
                optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
                optimizer.state[parameter] = {
                    key: padconvert.finetune.resume._laid_as(parameter, each) for key, each in stored.items()
                }
        ends.append(parameter.detach())
    assert torch.equal(*ends)
