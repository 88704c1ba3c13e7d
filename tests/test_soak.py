"""A slice of `make soak`, and proof that its watch would see each kind of failure."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from padconvert.errors import FileError, PadconvertError
from soak.fuzz import Bench, Outcome, outcome_from, run_block
from soak.run import Job, collect, fuzz_jobs, run_jobs, table
from soak.subjects import SUBJECTS, Subject

QUICK = [subject for subject in SUBJECTS if not subject.name.startswith("exported")]  # exporting takes seconds


@pytest.mark.parametrize("subject", QUICK, ids=[subject.name for subject in QUICK])
def test_damaged_files_are_refused_or_read(subject: Subject, tmp_path: Path) -> None:
    outcome = run_block(Bench(subject, tmp_path / "bench"), range(40), tmp_path / "outcome.json")
    assert outcome.failures == []
    assert outcome.cases == sum(outcome.ends.values()) == 40
    assert sum(count for end, count in outcome.ends.items() if end.startswith("exit")) >= 20


def test_the_soak_reads_a_hundred_thousand_files() -> None:
    assert sum(subject.cases for subject in SUBJECTS) >= 100_000
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)


def test_a_case_is_made_from_its_number_alone(tmp_path: Path) -> None:
    benches = [Bench(SUBJECTS[2], tmp_path / name) for name in "ab"]
    assert benches[0].case(7) == benches[1].case(7) != benches[0].case(8)


# ---- the watch ---------------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[Path], str]:
    def read(_: Path) -> str:
        raise error

    return read


def runs_code(path: Path) -> str:
    Path("canary").touch()
    raise FileError(f"{path}: refused, too late")


def swallows_the_alarm(_: Path) -> str:
    try:
        time.sleep(60)
    except Exception:
        return "no hang"
    return ""


def allocates(path: Path) -> str:
    block = bytearray(600 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    raise FileError(f"{path}: {len(block)}")


def crashes(_: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


READERS: dict[str, Callable[[Path], str]] = {
    "TypeError: traceback": raises(TypeError("traceback")),
    "AssertionError: exit code 1": raises(PadconvertError("internal")),
    "AssertionError: no file is named": raises(FileError("somewhere: something")),
    "AssertionError: a damaged file is taken for a good one": lambda path: "another meaning",  # noqa: ARG005
    "it ran code": runs_code,
    "Hang: over": swallows_the_alarm,
    "took ": allocates,
    "the process died (wait status 9)": crashes,
}


@pytest.mark.parametrize("what", READERS)
def test_the_watch_sees(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad case among three; the two others are read all the same."""
    # only the hang is to run into the bound: on a busy machine to allocate takes seconds too
    monkeypatch.setattr("soak.fuzz.SECONDS", 2 if what.startswith("Hang") else 60)

    def read(path: Path) -> str:
        return "good" if path.read_bytes() != b"bad" else READERS[what](path)

    def mutate(chance: Random, seeds: object) -> bytes:
        del seeds
        return b"bad" if chance.random() == Random("watched/1").random() else b"fine"

    subject = Subject("watched", 3, lambda _: [b"fine"], read, mutate, frozenset({4}), sealed=True)
    outcome = run_block(Bench(subject, tmp_path / "bench"), range(3), tmp_path / "outcome.json")
    assert outcome.cases == 3
    assert [index for index, _ in outcome.failures] == [1]
    assert outcome.failures[0][1].startswith(what)
    assert outcome.ends["same"] == 2


# ---- the run -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped_and_counts_everything_once(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def work(cases: range, _: Path) -> Outcome:
        with ran.open("a") as file:
            file.write(f"{cases.start}\n")
        outcome = Outcome(cases=len(cases), slowest_s=cases.start / 10)
        outcome.ends["exit 4"] += len(cases) - 1
        outcome.failures.append((cases.start, "it broke"))
        return outcome

    jobs = [Job("policy", range(start, start + 5), work) for start in range(0, 20, 5)]
    jobs.append(Job("cuts", range(100, 103), work))
    state = tmp_path / "state"
    state.mkdir()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        run_jobs(jobs[: 2 if folder == "first" else 5], state, tmp_path / folder)
    assert sorted(ran.read_text().split(), key=int) == ["0", "5", "10", "15", "100"]
    rows = collect(jobs, state)
    assert (rows["policy"].cases, rows["policy"].ends["exit 4"], rows["policy"].slowest_s) == (20, 16, 1.5)
    assert sorted(index for index, _ in rows["policy"].failures) == [0, 5, 10, 15]
    lines = table(rows).splitlines()
    assert lines[2] == "| policy | 20 | 16 | 0 | 0 | 0 | 4 | 1.50 | 0 |"
    assert lines[3] == "| **mutated inputs** | 20 | 16 | 0 | 0 | 0 | 4 | 1.50 | 0 |"
    assert lines[4].startswith("| cuts | 3 | 2 |")


def test_an_outcome_is_written_and_read(tmp_path: Path) -> None:
    subject = SUBJECTS[2]
    jobs = [job for job in fuzz_jobs(tmp_path, 1) if job.row == subject.name]
    outcome = jobs[0].work(range(30), tmp_path)
    assert outcome_from((tmp_path / "outcome.json").read_text()) == outcome
