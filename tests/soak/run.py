"""`make soak`: everything that takes too long for `make test`. Two processes, resumable (Ctrl-C and start again), one
table at the end, which also goes to docs/soak.md. `--cases N` reads fewer files than 100,000, and leaves docs alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from soak import bits, kills
from soak.fuzz import BLOCK, MEGABYTES, SECONDS, Bench, Outcome, outcome_from, run_block
from soak.subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 100_000
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Job:
    """Some cases of one row of the table; `work` is called in a forked process with a folder of its own."""

    row: str
    cases: range
    work: Callable[[range, Path], Outcome]

    @property
    def file(self) -> str:
        return f"{self.row}-{self.cases.start}-{self.cases.stop}.json".replace(" ", "_").replace("/", "_")


def fuzz_jobs(folder: Path, total: int) -> Iterator[Job]:
    for subject in SUBJECTS:
        count = max(subject.cases * total // TOTAL, 1)
        bench = Bench(subject, folder / subject.name.replace(" ", "_"))

        def work(cases: range, place: Path, bench: Bench = bench) -> Outcome:
            return run_block(bench, cases, place / "outcome.json")

        for start in range(0, count, BLOCK):
            yield Job(subject.name, range(start, min(start + BLOCK, count)), work)


def other_jobs(folder: Path) -> Iterator[Job]:
    bench = Bench(SUBJECTS[0], folder / "bits")
    cuts, flips = bits.sizes(bench)
    for start in range(0, cuts, 2000):
        cases = range(start, min(start + 2000, cuts))
        yield Job("artefact, cut at every byte", cases, lambda cases, place: bits.cut_everywhere(bench, cases, place))
    for start in range(0, flips, 4000):
        cases = range(start, min(start + 4000, flips))
        yield Job("artefact, every bit flipped", cases, lambda cases, place: bits.flip_everywhere(bench, cases, place))
    make = kills.prepare(folder / "kills")
    for start in range(0, len(kills.POINTS), 4):
        cases = range(start, min(start + 4, len(kills.POINTS)))
        yield Job("kill -9, then resumed", cases, lambda cases, _: kills.kill_and_resume(make, folder / "kills", cases))


def run_jobs(jobs: list[Job], state: Path, folder: Path) -> None:
    """What has no result in `state` yet, over `PROCESSES` processes."""
    missing = [job for job in jobs if not (state / job.file).exists()]
    children = [
        os.fork() or _work(missing[rank::PROCESSES], state, folder / f"process{rank}") for rank in range(PROCESSES)
    ]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"a process of the soak itself failed: {statuses}; 'make soak' goes on where it stopped")


def _work(jobs: list[Job], state: Path, folder: Path) -> int:
    status = 1
    try:
        folder.mkdir()
        for number, job in enumerate(jobs):
            outcome = job.work(job.cases, folder)
            unfinished = state / f"{job.file}.part"
            unfinished.write_text(json.dumps(vars(outcome)))
            unfinished.replace(state / job.file)
            if number % 10 == 0:
                print(f"{folder.name}: {number} of {len(jobs)} · {job.row}", file=sys.stderr, flush=True)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def fingerprint(total: int) -> str:
    """Of the code that is read with and the files that are read: results of other code are not taken over."""
    found = hashlib.sha256(f"{total} {torch.__version__} {sys.version_info}".encode())
    for path in sorted([*(ROOT / "padconvert").rglob("*.py"), *(ROOT / "tests" / "soak").glob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


# ---- the table ---------------------------------------------------------------------------------------------------

_COLUMNS = "what cases refused found_by_`verify` same_meaning another_meaning failures slowest_s most_MB"


def table(rows: dict[str, Outcome]) -> str:
    lines = ["| " + _COLUMNS.replace(" ", " | ").replace("_", " ") + " |", "|---" + "|--:" * 8 + "|"]
    fuzzed, total = {subject.name for subject in SUBJECTS}, Outcome()
    for name, row in rows.items():
        if name in fuzzed:
            total.add(row)
    shown = {name: row for name, row in rows.items() if name in fuzzed} | {"**mutated inputs**": total}
    shown |= {name: row for name, row in rows.items() if name not in fuzzed}
    for name, row in shown.items():
        refused = sum(count for end, count in row.ends.items() if end.startswith("exit") and end != "exit 7")
        counts = [row.cases, refused, row.ends["exit 7"], row.ends["same"], row.ends["another"], len(row.failures)]
        measured = [f"{row.slowest_s:.2f}", f"{row.most_mb:.0f}"] if row.slowest_s else ["", ""]
        lines.append(f"| {name} | " + " | ".join([*(f"{count:,}" for count in counts), *measured]) + " |")
    return "\n".join(lines)


_DOCUMENT = """# Soak

What `make soak` found, too long for `make test`: damaged files of every kind that padconvert reads, one small artefact
cut at every byte and with every bit flipped, and a trained conversion killed at {points} points. Every number is
measured; the table is written by the run itself.

* **Damaged** means bits flipped, bytes set, inserted, deleted, repeated or cut, two files spliced, lengths and offsets
  changed; *inside* and *forged* mean that the container and its checksums were made to fit afterwards, so that the
  reader behind them is reached. Each case is made from its number alone.
* **Failure** means anything but a clear refusal or a success: another exception, more than {seconds} s, more than
  {megabytes} MB over what was there before, code that ran, a process that died; for the artefact and the `.npz` file,
  which checksums cover, also a success with another meaning. Elsewhere a damaged file may be a good file that says
  something else, as a text may with one word changed; then loading and auditing must agree on it, or it must survive
  being written and read again.
* A killed conversion passes when its former output is intact, the resumed run ends in the bytes of an uninterrupted
  one, and nothing else is left beside them.

{table}

Measured {date} with `make soak`, two processes on a {cores}-core CPU, torch {torch}, {minutes:.0f} minutes.
"""


def document(rows: dict[str, Outcome], seconds: float) -> str:
    return _DOCUMENT.format(
        points=len(kills.POINTS), seconds=SECONDS, megabytes=MEGABYTES, table=table(rows), cores=os.cpu_count(),
        torch=torch.__version__.partition("+")[0], date=f"{datetime.now(UTC):%Y-%m-%d}", minutes=seconds / 60,
    )  # fmt: skip


def collect(jobs: list[Job], state: Path) -> dict[str, Outcome]:
    rows: dict[str, Outcome] = {}
    for job in jobs:
        rows.setdefault(job.row, Outcome()).add(outcome_from((state / job.file).read_text()))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=TOTAL, help="damaged files to read, of all kinds together")
    parser.add_argument("--state", type=Path, default=ROOT / ".soak", help="where finished parts are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    state = given.state.absolute() / fingerprint(given.cases)
    state.mkdir(parents=True, exist_ok=True)
    spent = state / "seconds.txt"
    start = time.monotonic() - (float(spent.read_text()) if spent.exists() else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [*other_jobs(Path(folder)), *fuzz_jobs(Path(folder), given.cases)]
        try:
            run_jobs(jobs, state, Path(folder))
        finally:
            spent.write_text(str(time.monotonic() - start))
        rows = collect(jobs, state)
    print(table(rows))
    failures = [(name, index, what) for name, row in rows.items() for index, what in row.failures]
    for name, index, what in failures:
        print(f"FAILED {name!r} {index}: {what}")
    if given.cases == TOTAL and not failures:
        (ROOT / "docs" / "soak.md").write_text(document(rows, time.monotonic() - start), encoding="utf-8")
    for old in state.parent.iterdir():
        if old != state:
            shutil.rmtree(old)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
