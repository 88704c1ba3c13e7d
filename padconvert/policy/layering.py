"""Nested plain values, laid one on another and written into by path, with where each was said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from padconvert.policy.check import did_you_mean
from padconvert.policy.document import Origin, Path_, dotted

_PATH_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def merge(
    into: dict[str, object],
    values: Mapping[str, object],
    path: Path_,
    origins: dict[Path_, Origin],
    new: Mapping[Path_, Origin],
    rank: int,
) -> None:
    """Mappings merge key by key; anything else, lists too, replaces what was there."""
    for key, value in values.items():
        here = (*path, key)
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merge(below, value, here, origins, new, rank)
            continue
        into[key] = plain(value)
        forget(origins, here)
        origins.update(
            {where: replace(origin, rank=rank) for where, origin in new.items() if where[: len(here)] == here}
        )


def plain(value: object) -> object:
    """A copy that later layers may write into."""
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def forget(origins: dict[Path_, Origin], path: Path_) -> None:
    """Take away where `path`, and all under it, was said."""
    for key in [key for key in origins if key[: len(path)] == path]:
        del origins[key]


def split(key: str) -> Path_:
    """`rules[0].name` as `("rules", 0, "name")`; what cannot be split stays one (unknown) key."""
    parts = [int(index) if index else name for name, index in _PATH_PART.findall(key)]
    return tuple(parts) if dotted(tuple(parts)) == key else (key,)


def child(place: object, part: str | int) -> object:
    """What stands under a key or an index; None where nothing does."""
    if isinstance(place, dict) and isinstance(part, str):
        return place.get(part)
    return place[part] if isinstance(place, list) and isinstance(part, int) and part < len(place) else None


def no_place(part: str | int, place: object) -> str:
    """That `place` has no `part`, and which was meant."""
    if isinstance(place, list):
        return f"there is no [{part}]: the list has {len(place)} entries"
    words = list(place) if isinstance(place, dict) else []
    return f"there is no {part!r} to set.{did_you_mean(str(part), words)}"
