"""One small artefact, cut off at every byte and with every bit flipped, one at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from padconvert.checkpoint.read import read_checkpoint
from padconvert.errors import FileError
from padconvert.verify import verify
from soak.fuzz import Bench, Outcome
from soak.subjects import digest, digest_of


def cut_everywhere(bench: Bench, cases: range, folder: Path) -> Outcome:
    """Cut to `cases` bytes: no reader takes any of them."""
    outcome, path, whole = Outcome(), folder / "cut.st", bench.seeds[0]
    for length in cases:
        path.write_bytes(whole[:length])
        outcome.cases += 1
        try:
            read_checkpoint(path)
            outcome.failures.append((length, "a file cut to so many bytes is taken for a good one"))
        except FileError:
            outcome.ends["exit 4"] += 1
    return outcome


def flip_everywhere(bench: Bench, cases: range, folder: Path) -> Outcome:
    """Bit n % 8 of byte n // 8 flipped. In a tensor `verify` finds it; in the header reading does, unless the file
    still says the same (the value of a key that nobody reads)."""
    path, whole = folder / "flipped.st", bench.seeds[0]
    path.write_bytes(whole)
    checkpoint = read_checkpoint(path)
    start, good = checkpoint.header.data_start, _meaning(path)
    outcome = Outcome()
    for number in cases:
        damaged = bytearray(whole)
        damaged[number // 8] ^= 1 << number % 8
        path.write_bytes(damaged)
        outcome.cases += 1
        try:
            found = not verify(path).passed
        except FileError:
            outcome.ends["exit 4"] += 1
            continue
        if found:
            outcome.ends["exit 7"] += 1
        elif number // 8 < start and _meaning(path) == good:
            outcome.ends["same"] += 1
        else:
            outcome.failures.append((number, "a flipped bit is not found"))
    return outcome


def _meaning(path: Path) -> str:
    checkpoint = read_checkpoint(path)
    return digest(checkpoint.manifest, digest_of(checkpoint.tensors()))


@cache
def sizes(bench: Bench) -> tuple[int, int]:
    """How many cuts and how many bits there are."""
    return len(bench.seeds[0]), 8 * len(bench.seeds[0])
