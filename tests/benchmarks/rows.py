"""What every table shares: the words of a call, rows that are kept as they are measured, and how they are printed."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from padconvert.bench import machine
from padconvert.paired import QUICK, Effort, Paired, Spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a table is taken. `folder` is where its JSON lies; quick numbers lie apart from those that stay."""

    quick: bool
    device: torch.device
    dtype: torch.dtype
    threads: int
    folder: Path

    @property
    def words(self) -> list[str]:
        """What of the command line is not the default."""
        dtype = str(self.dtype).removeprefix("torch.")
        said = ["--quick"] if self.quick else []
        said += ["--device", str(self.device)] if self.device.type != "cpu" else []
        return said + (["--dtype", dtype] if self.dtype is not torch.float32 else [])

    def effort(self, thorough: Effort) -> Effort:
        return QUICK if self.quick else thorough


def setting(words: Sequence[str] | None = None) -> Setting:
    """Of the command line; torch's threads are set. Every table takes the same options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rows, few rounds, kept in results/quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    folder = given.results / "quick" if given.quick else given.results
    return Setting(given.quick, torch.device(given.device), DTYPES[given.dtype], given.threads, folder)


def fingerprint(depends: Sequence[str]) -> str:
    """Of the code that a table times: rows that were taken of other code are taken again."""
    found = hashlib.sha256(torch.__version__.encode())
    for name in depends:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Table:
    """The rows of one table, each written as soon as it is measured: a table that was interrupted goes on."""

    def __init__(self, name: str, given: Setting, depends: Sequence[str]) -> None:
        self.name, self.setting = name, given
        where = "" if given.device.type == "cpu" else f"-{given.device.type}"
        kind = "" if given.dtype is torch.float32 else f"-{str(given.dtype).removeprefix('torch.')}"
        self.path = given.folder / f"{name}{where}{kind}.json"
        self.code = fingerprint([*depends, "padconvert/paired.py"])
        self.machine = asdict(machine(given.device, given.threads))
        self.command = " ".join([f"python -m benchmarks.{name}", *given.words])
        self.rows: dict[str, Row] = self._earlier()

    def _earlier(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        kept = json.loads(self.path.read_text())
        same = (kept["machine"], kept["code"]) == (self.machine, self.code)
        return kept["rows"] if same else {}

    def row(self, key: str, take: Callable[[], Row]) -> Row:
        """The row of this name: as it was measured before, or `take()`, which is then kept and printed."""
        if key not in self.rows:
            self.rows[key] = take()
            self._write()
        print(f"{key:36}  {said(self.rows[key])}", flush=True)
        return self.rows[key]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"machine": self.machine, "command": self.command, "code": self.code, "rows": self.rows}
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def paired_row(found: Paired, bases: Sequence[str], **facts: Any) -> Row:
    """Seconds and ratios as a row holds them: median, quartiles; over every base that was timed. An unfinished one
    (Ctrl-C) is not kept."""
    if not found.finished:
        raise KeyboardInterrupt
    over = {
        base: {name: _plain(found.ratio(name, base)) for name in found.seconds if name != base}
        for base in bases
        if base in found.seconds
    }
    seconds = {name: _plain(found.spread(name)) for name in found.seconds}
    return {**facts, "rounds": found.rounds, "seconds": seconds, "over": over}


def more_than(found: Paired, base: str) -> dict[str, list[float]]:
    """Seconds more than `base`, round by round."""
    return {
        name: _plain(Spread.of([one - other for one, other in zip(times, found.seconds[base], strict=True)]))
        for name, times in found.seconds.items()
        if name != base
    }


def _plain(spread: Spread) -> list[float]:
    return [float(f"{value:.5g}") for value in (spread.median, spread.low, spread.high)]


def said(row: Row) -> str:
    """A row in one line: its ratios, and whatever else is a number."""
    over = row.get("over", {})
    first = next(iter(over), "")
    parts = [f"{name} {ratio[0]:.2f}×" for name, ratio in over.get(first, {}).items()]
    parts += [f"{name} {value[0]:+.3f} s" for name, value in row.get("more", {}).items()]
    parts += [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    return "  ".join(parts)


def run(main: Callable[[Setting], None]) -> None:
    """`main` with the options of the command line. A Ctrl-C keeps the rows that are whole."""
    try:
        main(setting())
    except KeyboardInterrupt:
        print("interrupted; the rows above are kept, and the same command goes on from them", file=sys.stderr)
        sys.exit(130)
