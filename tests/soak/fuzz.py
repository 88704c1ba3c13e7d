"""Reads damaged files by the ten thousand, each in a process that is watched: `python -m soak.fuzz SUBJECT INDEX`
makes one of them again and reads it with its traceback.

A case passes if reading it comes to what a good file means, or to a PadconvertError of the subject's own exit codes
whose one line names the file. Anything else is a failure: another exception, a wrong success, more than `SECONDS` or
`MEGABYTES`, an effect (the canary of `load_attacks`), or a process that died.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from padconvert.errors import PadconvertError, UnsafeError
from soak.subjects import SUBJECTS, Subject

SECONDS = 5
MEGABYTES = 500
BLOCK = 250  # cases a process


class Hang(BaseException):
    """Not an Exception: no reader may catch it."""


@dataclass
class Outcome:
    """What came of some cases. `ends` counts them: "same", "another", or the exit code of the refusal."""

    cases: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    most_mb: float = 0.0

    def add(self, other: Outcome) -> None:
        self.cases += other.cases
        self.ends += other.ends
        self.failures += other.failures
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.most_mb = max(self.most_mb, other.most_mb)


def outcome_from(text: str) -> Outcome:
    found = json.loads(text)
    failures = [(int(index), str(what)) for index, what in found.pop("failures")]
    return Outcome(**{**found, "ends": Counter(found["ends"]), "failures": failures})


class Bench:
    """A subject's good files, what they mean, and a folder to read damaged ones in."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        (folder / "seeds").mkdir(parents=True)
        self.seeds = subject.make(folder / "seeds")
        self.path = folder / f"file{subject.suffix}"
        self.good: set[str] = set()
        for seed in self.seeds:
            self.path.write_bytes(seed)
            try:
                self.good.add(subject.read(self.path))
            except UnsafeError:
                continue  # a hostile seed
        assert self.good

    def case(self, index: int) -> bytes:
        return self.subject.mutate(Random(f"{self.subject.name}/{index}"), self.seeds)

    def read(self, path: Path) -> str:
        """How reading ends: "same", "another" or an exit code. Raises what is a failure."""
        try:
            meaning = self.subject.read(path)
        except PadconvertError as error:
            said, code = str(error), error.exit_code
            assert code in self.subject.codes, f"exit code {code}: {said}"
            assert str(path) in said, f"no file is named: {said}"
            assert self.subject.lines or "\n" not in said, f"several lines: {said}"
            return f"exit {code}"
        assert meaning in self.good or not self.subject.sealed, "a damaged file is taken for a good one"
        return "same" if meaning in self.good else "another"


def try_one(bench: Bench, index: int, path: Path, outcome: Outcome) -> None:
    path.write_bytes(bench.case(index))
    before, start = resident_mb(), time.perf_counter()
    try:
        with at_most(SECONDS):
            outcome.ends[bench.read(path)] += 1
    except (Exception, Hang) as error:
        said = (str(error).splitlines() or [""])[0][:300].replace(str(path), "FILE")
        outcome.failures.append((index, f"{type(error).__name__}: {said}"))
    if Path("canary").exists():
        Path("canary").unlink()
        outcome.failures.append((index, "it ran code"))
    outcome.cases += 1
    outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
    grown = peak_mb() - before
    outcome.most_mb = max(outcome.most_mb, grown)
    if grown > MEGABYTES:
        outcome.failures.append((index, f"took {grown:.0f} MB"))
        raise SystemExit  # the peak never falls again: the rest of the block needs a new process


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang(f"over {seconds} s")

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---- processes ---------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A forked process that goes through cases; `progress` is shared: the number that it is at."""

    bench: Bench
    cases: range
    result: Path
    progress: mmap.mmap
    pid: int = 0
    at: int = -1
    since: float = 0.0

    def start(self) -> None:
        self.since = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _work(self)
            os._exit(0)

    def now(self) -> int:
        return int.from_bytes(self.progress[:8], "little")

    def stuck(self) -> bool:
        """Whether one case takes so long that not even the alarm in the process has ended it."""
        if self.now() != self.at:
            self.at, self.since = self.now(), time.monotonic()
        return time.monotonic() - self.since > 3 * SECONDS


def _work(child: Child) -> None:
    """Limits itself, then reads; the outcome so far is on disk after every case that fails, and at the end."""
    outcome = Outcome()
    workplace = child.result.with_suffix(".work")
    workplace.mkdir(exist_ok=True)
    os.chdir(workplace)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + 2 * MEGABYTES * 10**6  # address space: what was asked for, used or not
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = workplace / child.bench.path.name
    for index in child.cases:
        child.progress[:8] = index.to_bytes(8, "little")
        try:
            try_one(child.bench, index, path, outcome)
        except SystemExit:
            break
        finally:
            child.result.write_text(json.dumps(vars(outcome)))


def run_block(bench: Bench, cases: range, result: Path) -> Outcome:
    """All of `cases`, in as many processes as it takes."""
    total, left = Outcome(), cases
    while left:
        child = Child(bench, left, result, mmap.mmap(-1, 8))
        child.progress[:8] = left.start.to_bytes(8, "little")
        result.write_text(json.dumps(vars(Outcome())))
        child.start()
        status = _wait(child)
        done = outcome_from(result.read_text())
        if status != 0:
            done.cases += 1
            done.failures.append((child.now(), f"the process died (wait status {status})"))
        total.add(done)
        left = range(left.start + done.cases, left.stop)
    return total


def _wait(child: Child) -> int:
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            return status
        if child.stuck():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.005)


def main(words: Sequence[str]) -> None:
    import tempfile

    torch.set_num_threads(1)
    subject = next(each for each in SUBJECTS if each.name == words[0])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(subject, Path(folder) / "bench")
        bench.path.write_bytes(bench.case(int(words[1])))
        os.chdir(folder)
        print(bench.read(bench.path))


if __name__ == "__main__":
    main(sys.argv[1:])
