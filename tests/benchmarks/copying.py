"""The floor of a conversion: read the source, write as many bytes as the output has, sha256 of both, fsync.

python -m benchmarks.copying SOURCE TARGET BYTES THREADS. Imports nothing that is not needed for it. One pass; with two
threads what is read is hashed beside what is written.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 22


def copy(source: Path, target: Path, size: int, threads: int) -> tuple[str, str]:
    """The two checksums. What is written is the source, again from its start where the output is larger."""
    read, written = hashlib.sha256(), hashlib.sha256()
    left = size
    with source.open("rb") as from_, target.open("wb") as to, ThreadPoolExecutor(1) as pool:
        while piece := from_.read(PIECE):
            done = _begin(pool if threads > 1 else None, read.update, piece)
            left -= _write(to, piece[:left], written)
            done()
        from_.seek(0)
        while left and (piece := from_.read(PIECE)):
            left -= _write(to, piece[:left], written)
        to.flush()
        os.fsync(to.fileno())
    assert not left, "the output is more than twice the source"
    return read.hexdigest(), written.hexdigest()


def _begin(pool: Executor | None, work: Callable[[bytes], None], piece: bytes) -> Callable[[], None]:
    """Does it now, or beside what follows; what is returned waits for it."""
    if pool is None:
        work(piece)
        return lambda: None
    return pool.submit(work, piece).result


def _write(to, piece: bytes, digest) -> int:  # type: ignore[no-untyped-def]
    digest.update(piece)
    to.write(piece)
    return len(piece)


if __name__ == "__main__":
    print(*copy(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
