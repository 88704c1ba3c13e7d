"""An artefact appears whole or not at all, and never in the place of something it must not replace."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import padconvert.checkpoint.whole_file
from checkpoint_cases import entry, manifest, same_bits, tensors_of
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.whole_file import write_text
from padconvert.checkpoint.write import write_checkpoint
from padconvert.errors import FileError, PadconvertError, UsageError


class Watched(dict[str, Tensor]):
    """Tensors that do something when they are fetched for the n-th time."""

    def __init__(self, when: int, what: Callable[[], object]) -> None:
        super().__init__({"a": torch.zeros(1000), "b": torch.ones(1000)})
        self.fetched, self.when, self.what = 0, when, what

    def __getitem__(self, name: str) -> Tensor:
        self.fetched += 1
        if self.fetched == self.when:
            self.what()
        return super().__getitem__(name)


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def test_what_is_reported_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = write_checkpoint(path, tensors_of(entry()), manifest(entry()))
    content = path.read_bytes()
    assert written.bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.header_bytes == 8 + int.from_bytes(content[:8], "little") == read_checkpoint(path).header.data_start
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "x", {}, manifest())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_existing_output_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match=r"x exists; --force replaces it"):
        write_checkpoint(path, {}, manifest())
    assert path.read_bytes() == b"old"
    write_checkpoint(path, {"a": torch.arange(3.0)}, manifest(), force=True)
    assert same_bits(read_checkpoint(path).tensor("a"), torch.arange(3.0))


def test_output_that_comes_up_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(UsageError, match="exists"):
        write_checkpoint(path, Watched(3, lambda: path.write_bytes(b"other")), manifest())
    assert path.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_checkpoint(tmp_path / "link", {}, manifest(), force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() != b"old"


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes(b"the model")
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(UsageError, match="is the source itself"):
            write_checkpoint(target, {}, manifest(), force=True, source=source)
    assert source.read_bytes() == b"the model"


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[Path, type[PadconvertError], str]] = [
        (tmp_path, UsageError, "is a folder; name a file to write"),
        (tmp_path / "pipe", UsageError, "is no regular file"),
        (Path("/dev/null"), UsageError, "is no regular file"),
        (tmp_path / "missing" / "x", FileError, "the folder .*missing does not exist"),
        (tmp_path / "file" / "x", FileError, "the folder .*file does not exist|Not a directory"),
        (tmp_path / ("x" * 300), FileError, "File name too long"),
        (tmp_path / "nul\0", FileError, "null byte|does not exist"),
    ]
    for path, error, message in cases:
        with pytest.raises(error, match=message):
            write_checkpoint(path, {}, manifest(), force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; the file needs [0-9]+ bytes"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "its folder cannot be written to"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_disk_that_refuses(
    code: int, message: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail(OSError(code, os.strerror(code))))
    with pytest.raises(FileError, match=message):
        write_checkpoint(path, {"a": torch.zeros(10)}, manifest(), force=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow past 64 kB, half-way through its second tensor."""
    script = (
        "import resource, sys, torch; from checkpoint_cases import manifest\n"
        "from padconvert.checkpoint.write import write_checkpoint; from padconvert.errors import FileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "try: write_checkpoint(sys.argv[1], {n: torch.ones(12_000) * i for i, n in enumerate('ab')}, manifest())\n"
        "except FileError as error: print(error)"
    )
    done = run(script, tmp_path / "x")
    assert done.stdout.strip() == f"{tmp_path / 'x'}: cannot be written: File too large."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", [1, 3, 4])
def test_an_interrupt_leaves_nothing_behind(when: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "x", Watched(when, fail(KeyboardInterrupt())), manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys; from test_checkpoint_write import Watched, manifest, write_checkpoint\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(sys.argv[1], Watched(4, kill), manifest(), force=True)"
    )
    assert run(script, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".tmp"]  # it really was half-way
    (tmp_path / ".padconvert-notes.tmp").write_bytes(b"somebody's own")
    write_checkpoint(tmp_path / "y", {}, manifest())
    assert len(list(tmp_path.iterdir())) == 4  # another output's leftover stays
    write_checkpoint(path, {}, manifest(), force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".padconvert-notes.tmp", "x", "y"]


def test_what_a_live_run_is_writing_is_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "x"
    script = (
        "import sys; from test_checkpoint_write import Watched, manifest, write_checkpoint\n"
        "wait = lambda: (print('writing', flush=True), sys.stdin.read())\n"
        "write_checkpoint(sys.argv[1], Watched(4, wait), manifest(), force=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        write_checkpoint(path, {}, manifest())
        ours = path.read_bytes()
        assert len(list(tmp_path.iterdir())) == 2
        other.communicate(b"")
    assert other.returncode == 0
    assert path.read_bytes() != ours
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_taken_away_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run looked for leftovers in the moment between opening and locking."""
    lock = padconvert.checkpoint.whole_file.lock
    taken: list[Path] = []

    def slow(descriptor: int, *, wait: bool) -> bool:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(padconvert.checkpoint.whole_file, "lock", slow)
    write_checkpoint(tmp_path / "x", {"a": torch.arange(3.0)}, manifest())
    assert len(taken) == 1
    assert same_bits(read_checkpoint(tmp_path / "x").tensor("a"), torch.arange(3.0))
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_text_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(FileError, match=r"link\.json: cannot be written .No space left on device"):
            write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "real.json").read_text() == "old"
    write_text(tmp_path / "link.json", "näu")
    assert (tmp_path / "real.json").read_text(encoding="utf-8") == "näu"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent)}


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)


def test_a_tensor_that_changes_while_it_is_written(tmp_path: Path) -> None:
    tensors = Watched(3, lambda: dict.__getitem__(tensors, "b").zero_())
    with pytest.raises(PadconvertError, match="tensor 'b' changed while it was being written"):
        write_checkpoint(tmp_path / "x", tensors, manifest())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, device="meta"), "tensor 'x' has no values .meta device."),
        (torch.eye(2).to_sparse(), "tensor 'x' is sparse or quantised"),
        (torch.zeros(2, dtype=torch.complex128), "tensor 'x' is complex128, which a safetensors file cannot hold"),
    ],
)
def test_tensors_that_cannot_be_stored(tensor: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        write_checkpoint(tmp_path / "x", {"x": tensor}, manifest())
    assert list(tmp_path.iterdir()) == []


def test_the_writer_holds_itself_to_the_layout(tmp_path: Path) -> None:
    tensors = tensors_of(entry())
    for wrong, message in [
        ({"body.conv.weight": torch.zeros(1)}, "'body.conv.weight' is unexpected in the dynamic layer"),
        ({"body.conv.weight_static": torch.zeros(1)}, "the manifest says float32 .125."),
        ({"body.conv.dynamic_bitmask": torch.zeros(17).byte()}, "0 bits are set, the manifest says 10"),
    ]:
        with pytest.raises(FileError, match=message):
            write_checkpoint(tmp_path / "x", tensors | wrong, manifest(entry()))
    assert list(tmp_path.iterdir()) == []
