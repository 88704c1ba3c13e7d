"""Reads hostile files by the command line, all in this one process: `python attack_reads.py FOLDER TRUST` prints a line
of JSON for each: its name, the exit codes of `inspect --audit` and `convert`, the seconds of the slower, the megabytes
that the peak of memory is above what the process held before the first file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from padconvert.__main__ import main

#: address space, asked for or used, that the process may take beyond what it has: a bomb ends in MemoryError
CEILING = 1 << 30


def statm(place: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[place]) * os.sysconf("SC_PAGESIZE")


def peak() -> int:
    """Bytes; not ru_maxrss, which begins at what the parent process held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def timed(*words: str) -> tuple[int, float]:
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(list(words))
    return code, time.monotonic() - start


def read(path: Path, *trust: str) -> tuple[int, int, float]:
    audited, first = timed("inspect", str(path), "--audit", *trust)
    converted, second = timed("convert", str(path), "-o", "out.st", "--force", "-q", *trust)
    return audited, converted, max(first, second)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, trust = Path(sys.argv[1]), ("--trust", sys.argv[2])
    for sound in sorted(folder.glob("sound*")):  # what is imported once, and what any file of the kind takes
        audited, converted, _ = read(sound, *trust)
        assert audited == 0, sound
        assert converted in (0, 5), sound  # 5: it loads, and nothing in it is eligible
    Path("out.st").unlink()
    limit = statm(0) + CEILING
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = statm(1)
    for path in sorted(set(folder.iterdir()) - set(folder.glob("sound*"))):
        audited, converted, seconds = read(path, *trust)
        print(json.dumps([path.name, audited, converted, seconds, (peak() - before) / 1e6]), flush=True)
