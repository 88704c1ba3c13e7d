"""Damaged copies of good files: the same for the same random state, so that any of them can be made again alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutation = Callable[[Random, Sequence[bytes]], bytes]

_NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
_WORDS = (
    b"0 -1 1e999 NaN null true {} [] [[[[ }}}} \"\" '' : , ~ & *a &a << !!python/name:os.system "
    b"\0 \xff \xed\xa0\x80 .. "
    b"/ \\ \n \t 99999999999999999999 0x1f 1_000 os:system __class__ __setstate__ . ctorch\n \x80\x04 R b \x81 \x93 %s"
).split(b" ")
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "a", "..", "../x", "os:system",
    "\0", "\ud800", "x" * 5000, [], {}, [[]], {"": 0}, [0] * 70, "float16", "float32", "int64", "__class__",
]  # fmt: skip


def mutated(chance: Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with one to four faults in its bytes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_EDITS)(chance, data, seeds)
    return bytes(data)


def _flip(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _place(chance, data)
    data[at : at + 1] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))])


def _insert(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _place(chance, data)
    data[at:at] = chance.choice((chance.choice(_WORDS), chance.randbytes(chance.choice((1, 2, 8, 64, 4096)))))


def _overwrite(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at, word = _place(chance, data), chance.choice(_WORDS)
    data[at : at + len(word)] = word


def _delete(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _place(chance, data)
    del data[at : at + chance.choice((1, 2, 4, 8, 64, 1024))]


def _repeat(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _place(chance, data)
    span = bytes(data[at : at + chance.choice((1, 4, 16, 256))])
    data[at:at] = span * chance.choice((1, 2, 50))


def _truncate(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(chance, data) :]


def _splice(chance: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = chance.choice(seeds)
    data[_place(chance, data) :] = other[chance.randrange(len(other) + 1) :]


def _length(chance: Random, data: bytearray, _: Sequence[bytes]) -> None:
    """A number where a format may keep a length or an offset: a limit, or a little more or less than is there."""
    width = chance.choice((2, 4, 8))
    at = chance.choice((0, _place(chance, data), max(len(data) - chance.randrange(1, 64), 0)))
    now = int.from_bytes(data[at : at + width], "little")
    wanted = chance.choice((*_NUMBERS, now + 1, now - 1, now * 2, len(data), len(data) - at))
    data[at : at + width] = (wanted % 2 ** (8 * width)).to_bytes(width, "little")


_EDITS = (_flip, _flip, _set, _insert, _overwrite, _delete, _repeat, _truncate, _splice, _length)


def _place(chance: Random, data: bytearray) -> int:
    return chance.randrange(len(data) + 1)


# ---- inside containers, so that the container's own checks do not stop what is meant for the reader behind them ----


def mutated_json(chance: Random, text: bytes, others: Sequence[bytes]) -> bytes:
    """JSON text with one to three values replaced, removed or moved; still JSON, or (one in four) damaged as bytes."""
    if chance.random() < 0.25:
        return mutated(chance, [text, *others])
    document = json.loads(text)
    for _ in range(chance.choice((1, 1, 2, 3))):
        _change_value(chance, document)
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _change_value(chance: Random, document: Any) -> None:
    places = [(node, key) for node in _containers(document) for key in _keys(node)]
    if not places:
        return
    node, key = chance.choice(places)
    what = chance.randrange(6)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[chance.choice(("", "x", "__class__", "weight", *(str(each) for each in node)))] = node.pop(key)
    elif what == 2:
        other, name = chance.choice(places)
        node[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
    elif what == 3 and isinstance(node[key], int):
        node[key] += chance.choice((-1, 1, 2**31))
    else:
        node[key] = chance.choice(_VALUES)


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


def _containers(value: Any) -> list[Any]:
    found, stack = [], [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            found.append(node)
            stack += node.values() if isinstance(node, dict) else node
    return found


def mutated_member(chance: Random, seeds: Sequence[bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A sound zip archive, one member of which is damaged (or, one in ten, gone, twice there, or renamed)."""
    contents = _unpacked(chance.choice(seeds))
    others = [data for seed in seeds for data in _unpacked(seed).values()]
    # the structured members are small: they count as much as the tensors
    name = chance.choice(sorted(contents))
    if chance.random() < 0.1:
        moved = contents.pop(name)
        contents |= {chance.choice((name + "x", "../" + name, "x", name.upper())): moved}
    elif name.endswith(".json"):
        contents[name] = mutated_json(chance, contents[name], others)
    else:
        contents[name] = mutated(chance, [contents[name], contents[name], chance.choice(others)])
    return _packed(contents, method)


def _unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _packed(contents: dict[str, bytes], method: int) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return into.getvalue()
