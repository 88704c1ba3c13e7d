"""Whole commands in processes of their own: how they are called, and what memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import ROOT

PADCONVERT = (sys.executable, "-m", "padconvert")
#: how often a running process is asked for its memory
INTERVAL = 0.002


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": str(threads)}


def run(words: Sequence[str], folder: Path, threads: int) -> None:
    """Raises CalledProcessError where it fails: a failure has no time."""
    done = subprocess.run(words, cwd=folder, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")


def peak_anonymous(words: Sequence[str], folder: Path, threads: int) -> int:
    """Bytes of anonymous memory at the peak, sampled: pages of files that are mapped are not counted."""
    process = subprocess.Popen(
        words, cwd=folder, env=environment(threads), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}")
    return peak


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it ended just now
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
