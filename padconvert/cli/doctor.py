"""`padconvert doctor`."""

from __future__ import annotations

from padconvert.cli import arguments as arg


def doctor(as_json: arg.Json = False) -> None:
    """Say which versions, devices and extras there are, and how to install what is missing."""
    from padconvert.cli import run
    from padconvert.doctor import examine

    run.show(examine(), as_json=as_json)
