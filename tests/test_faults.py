"""What the system does to a run: signals, full and read-only disks. The former output stays, nothing else is left."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

import padconvert.checkpoint.write
import padconvert.finetune.resume
from padconvert.__main__ import main

STEPS = ("--steps", "12", "--batch-size", "8", "--lr", "0.05", "--set", "partition.batches=2")
PAGE = 4096


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, data, and the trained artefact of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        torch.save(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).eval(), folder / "model.pt")
    x = np.random.RandomState(0).randn(64, 1, 8, 8).astype("float32")
    np.savez(folder / "data.npz", x=x, y=np.random.RandomState(1).randint(0, 3, 64))
    assert main(trained(folder, folder / "whole.st")) == 0
    assert main(["convert", str(folder / "model.pt"), "-o", str(folder / "free.st"), "-q"]) == 0
    return folder


def trained(place: Path, output: Path, *more: str) -> list[str]:
    words = ["convert", str(place / "model.pt"), "-o", str(output), "--force", "--data", str(place / "data.npz"), "-q"]
    return [*words, *STEPS, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- signals -----------------------------------------------------------------------------------------------------


def once(then: Callable[[], object], number: int = 1, *, after: bool = False) -> Callable[[Any], Any]:
    """Wraps a function: `then` happens before, or after, its `number`-th call."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[None] = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == number and not after:
                then()
            result = function(*args, **kwargs)
            if len(calls) == number and after:
                then()
            return result

        return wrapped

    return wrap


#: the moment, and the function that is called there: its module, its name, the number of the call
MOMENTS: dict[str, tuple[str, str, int]] = {
    "loading": ("padconvert.convert", "open_input", 1),
    "planning": ("padconvert.convert", "make_plan", 1),
    "rewriting": ("padconvert.convert", "equality", 1),
    "warming up": ("padconvert.finetune.loop", "set_lr_", 2),
    "between rounds": ("padconvert.finetune.loop", "set_lr_", 7),
    "saving the state": ("padconvert.finetune.resume", "save_file", 3),
    "folding": ("padconvert.convert", "fold_", 1),
    "choosing": ("padconvert.convert", "stream", 1),
    "comparing": ("padconvert.stream", "probe_check", 1),
    "writing": ("padconvert.checkpoint.write", "write_tensors", 1),
    "reading back": ("padconvert.seal", "read_checkpoint", 1),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGTERM) for moment in MOMENTS if moment not in ("choosing", "comparing")),
        ("between rounds", signal.SIGINT),
        ("writing", signal.SIGINT),
    ],
)
def test_a_signal_ends_in_130_and_the_same_call_goes_on(
    moment: str, number: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(padconvert.finetune.resume, "SAVE_EVERY", 0.0)
    (tmp_path / "out.st").write_bytes(b"yesterday")
    words = trained(place, tmp_path / "out.st", "--work-dir", str(tmp_path / "work"))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        place_of_it, name, call = MOMENTS[moment]
        module = importlib.import_module(place_of_it)  # by name: padconvert.convert is a function too
        kill = once(lambda: os.kill(os.getpid(), number), call, after=moment == "writing")
        patch.setattr(module, name, kill(getattr(module, name)))
        assert main(words) == 130
    said = capsys.readouterr().err
    assert said.startswith("error: Interrupted; no artefact was written")
    assert said.count("\n") == 1
    assert files(tmp_path) == {"out.st": b"yesterday"}
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(words) == 0
    assert (tmp_path / "out.st").read_bytes() == (place / "whole.st").read_bytes()


def test_a_second_sigterm_does_not_stop_the_cleaning_up(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate = once(lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Path, "unlink", terminate(Path.unlink))
    write = padconvert.checkpoint.write.write_tensors
    monkeypatch.setattr(padconvert.checkpoint.write, "write_tensors", terminate(write))
    assert main(["convert", str(place / "model.pt"), "-o", str(tmp_path / "out.st")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_sigterm_outside_of_a_conversion_is_130_too(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminate = once(lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("padconvert.verify.verify", terminate(lambda *_, **__: None))
    assert main(["verify", str(place / "free.st"), "--json"]) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert json.loads(captured.out)["exit_code"] == 130


@pytest.mark.parametrize("moment", ["loading", "planning", "choosing", "writing", "reading back", "comparing"])
def test_a_ctrl_c_in_a_run_without_training_leaves_nothing(
    moment: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(place / "model.pt"), "-o", str(tmp_path / "out.st"), "--force", "-q"]
    (tmp_path / "out.st").write_bytes(b"yesterday")
    with monkeypatch.context() as patch:
        place_of_it, name, call = MOMENTS[moment]
        module = importlib.import_module(place_of_it)
        kill = once(lambda: os.kill(os.getpid(), signal.SIGINT), call, after=moment == "writing")
        patch.setattr(module, name, kill(getattr(module, name)))
        assert main(words) == 130
    assert capsys.readouterr().err == (
        "error: Interrupted; nothing was written. With --work-dir DIR a run can be resumed.\n"
    )
    assert files(tmp_path) == {"out.st": b"yesterday"}
    assert main(words) == 0
    assert (tmp_path / "out.st").read_bytes() == (place / "free.st").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_is_terminated(number: int, place: Path, tmp_path: Path) -> None:
    """From outside, at no chosen moment, with output in the middle of a line."""
    words = trained(place, tmp_path / "out.st", "--work-dir", str(tmp_path / "work"), "--steps", "1000000")
    process = subprocess.Popen([sys.executable, "-m", "padconvert", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "work" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Interrupted" in said
    assert f"The same command goes on from {tmp_path / 'work'}." in said
    assert files(tmp_path) == {}


# ---- disks that refuse -------------------------------------------------------------------------------------------


class Full:
    """A file whose `number`-th write finds the disk full after half of its bytes; `number` 0 only counts."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.file, self.number, self.calls = file, number, 0

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.calls += 1
        if self.calls == self.number:
            self.file.write(memoryview(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.mark.parametrize("artefact", ["free.st", "whole.st"])
def test_a_disk_that_fills_up_at_any_write_leaves_the_old_output(
    artefact: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Full] = []
    number = 0
    fdopen = os.fdopen

    def full(descriptor: int, mode: str) -> Full:
        opened.append(Full(fdopen(descriptor, mode), number))  # type: ignore[arg-type]
        return opened[-1]

    (tmp_path / "out.st").write_bytes(b"yesterday")
    words = ["convert", str(place / "model.pt"), "-o", str(tmp_path / "out.st"), "--force", "-q"]
    if artefact == "whole.st":  # trained once, then only written
        words = trained(place, tmp_path / "out.st", "--work-dir", str(tmp_path / "work"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        number = 1
        while main(words) != 0:
            assert "the disk is full; the file needs" in capsys.readouterr().err
            assert files(tmp_path) == {"out.st": b"yesterday"}
            number += 1
    assert number - 1 == opened[-1].calls > 8  # it was full at every one of them
    assert files(tmp_path) == {"out.st": (place / artefact).read_bytes()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)):
        pytest.skip("a small file system cannot be mounted here (that needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("artefact", ["free.st", "whole.st"])
def test_a_disk_that_really_is_full(
    artefact: str, place: Path, tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk / "out.st").write_bytes(b"yesterday")
    words = ["convert", str(place / "model.pt"), "-o", str(disk / "out.st"), "--force", "-q"]
    if artefact == "whole.st":
        words = trained(place, disk / "out.st", "--work-dir", str(tmp_path / "work"))
    pages = -(-(place / artefact).stat().st_size // PAGE)
    for free in range(pages):
        _leave_free(disk, free)
        assert main(words) == 4
        assert "the disk is full; the file needs" in capsys.readouterr().err
        assert {path.name for path in disk.iterdir()} == {"ballast", "out.st"}
        assert (disk / "out.st").read_bytes() == b"yesterday"
    _leave_free(disk, pages)
    assert main(words) == 0
    assert (disk / "out.st").read_bytes() == (place / artefact).read_bytes()


def _leave_free(disk: Path, pages: int) -> None:
    (disk / "ballast").unlink(missing_ok=True)
    left = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(left.f_bavail * left.f_frsize - pages * PAGE))


@pytest.mark.parametrize("option", ["--work-dir", "--plan-out", "--report"])
def test_what_is_written_beside_the_output_meets_a_full_disk(
    option: str, place: Path, tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave_free(disk, 1)
    beside = disk / ("beside.html" if option == "--report" else "beside")
    assert main(trained(place, tmp_path / "out.st", option, str(beside))) == 4
    said = capsys.readouterr().err
    assert str(beside) in said
    assert said.count("\n") == 1
    if option == "--work-dir":
        assert sorted(path.name for path in beside.iterdir()) == ["lock", "run.json"]
    else:
        assert [path.name for path in disk.iterdir()] == ["ballast"]
    (disk / "ballast").unlink()
    assert main(trained(place, tmp_path / "out.st", option, str(beside))) == 0
    assert (tmp_path / "out.st").read_bytes() == (place / "whole.st").read_bytes()


def test_a_read_only_disk(place: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (disk / "out.st").write_bytes(b"yesterday")
    assert _mount("-o", "remount,ro", str(disk))
    assert main(["convert", str(place / "model.pt"), "-o", str(disk / "out.st"), "--force"]) == 4
    assert "cannot be written to" in capsys.readouterr().err
    assert main(["convert", str(place / "model.pt"), "--report", str(disk / "x.html")]) == 4
    assert "cannot be written to" in capsys.readouterr().err
    assert main(trained(place, disk.parent / "out.st", "--work-dir", str(disk / "work"))) == 4
    assert "--work-dir" in capsys.readouterr().err
    assert files(disk) == {"out.st": b"yesterday"}
    assert not (place / "model.pad.safetensors").exists()


def test_a_standard_output_that_is_full(place: Path) -> None:
    for words, code in ((["policy", "show"], 4), (["convert", "--json"], 2), (["--help"], 4)):
        with Path("/dev/full").open("wb") as full:
            command = [sys.executable, "-m", "padconvert", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=place)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert code != 4 or "standard output" in done.stderr


@pytest.mark.parametrize("words", ["inspect model.pt", "convert model.pt --json", "inspect absent.pt", "policy schema"])
def test_a_standard_output_that_is_closed(place: Path, words: str) -> None:
    before = files(place)
    command = f'"{sys.executable}" -m padconvert {words} >&-'
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=place)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert done.stderr.startswith("error: the standard output is closed")
    assert files(place) == before


def test_with_a_closed_standard_error_nothing_of_it_reaches_the_output(place: Path) -> None:
    command = f'"{sys.executable}" -m padconvert inspect absent.pt 2>&-'
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, cwd=place)
    assert (done.returncode, done.stdout) == (4, b"")


# ---- targets -----------------------------------------------------------------------------------------------------


def _link(link: Path, to: Path | str) -> Path:
    link.symlink_to(to)
    return link


def test_targets_that_are_something_else(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes((place / "model.pt").read_bytes())
    (tmp_path / "hard.st").hardlink_to(source)
    (tmp_path / "folder").mkdir()
    links = {name: _link(tmp_path / f"{name}.st", to) for name, to in {
        "source": "model.pt", "folder": "folder", "loop": "loop.st", "nowhere": "missing/out.st"}.items()}  # fmt: skip
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for output, code, said in [
        (tmp_path, 2, "is a folder"),
        (links["folder"], 2, "is a folder"),
        (links["source"], 2, "the source itself"),
        (tmp_path / "hard.st", 2, "the source itself"),
        (links["loop"], 2, "in a circle"),
        (links["nowhere"], 4, "does not exist"),
    ]:
        assert main(["convert", str(source), "-o", str(output), "--force"]) == code, output
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert source.read_bytes() == (place / "model.pt").read_bytes()


def test_a_link_to_a_file_not_yet_there_is_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = _link(tmp_path / "out.st", "far/real.st")
    assert main(["convert", str(place / "model.pt"), "-o", str(link), "-q"]) == 0
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["real.st"]


@pytest.mark.parametrize("option", ["-o", "--plan-out"])
@pytest.mark.parametrize("name", ["data.npz", "policy.yaml", "plan.json"])
def test_what_a_run_reads_is_never_overwritten(
    option: str, name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.npz").write_bytes((place / "data.npz").read_bytes())
    (tmp_path / "policy.yaml").write_text("version: 1\nextends: paper\n")
    (tmp_path / "plan.json").write_text("{}")
    before = files(tmp_path)
    words = ["convert", str(place / "model.pt"), "--data", str(tmp_path / "data.npz"), option, str(tmp_path / name)]
    words += ["--policy", str(tmp_path / "policy.yaml"), "--plan", str(tmp_path / "plan.json"), "--force"]
    assert main(words) == 2
    assert "is read by this run" in capsys.readouterr().err
    assert files(tmp_path) == before


# ---- while something is imported

SLOW = """
import threading
import time
try:
    for _ in range(40):
        time.sleep(0.01)
except BaseException:
    pass
whole = True
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_that_catches_everything_loses_no_signal(
    number: int, place: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numpy and torch catch what is raised while they are imported, and go on with half of their modules."""
    (in_tmp / "slow_import.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(in_tmp))
    reached: list[str] = []

    def imports(*_: object, **__: object) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        module = importlib.import_module("slow_import")
        assert module.whole
        reached.append("imported")
        time.sleep(5)
        reached.append("went on")

    monkeypatch.setattr("padconvert.verify.verify", imports)
    monkeypatch.delitem(sys.modules, "slow_import", raising=False)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main(["verify", str(place / "free.st")]) == 130
    assert reached == ["imported"]
    assert "interrupted" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so(place: Path) -> None:
    """A run in the background of a shell, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["verify", str(place / "free.st"), "--json"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
