"""The header: byte-equal to the library's where that one is deterministic, and strict in every other file's case."""

from __future__ import annotations

import json
import os
import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_cases import STORABLE, names, random_tensor, same_bits, specs
from padconvert.checkpoint.header import MAX_HEADER, Slot, encode_header, read_header, read_metadata
from padconvert.checkpoint.read import open_tensors
from padconvert.errors import FileError


def file_of(document: object, data: bytes = b"", *, tail: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data + tail


def tensor(begin: int = 0, end: int = 8, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def on_disk(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@given(
    specs, st.one_of(st.just({}), st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=1))
)
def test_same_bytes_as_the_library(wanted: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    tensors = {name: random_tensor(*spec, n) for n, (name, spec) in enumerate(wanted.items())}
    library = safetensors.torch.save(tensors, metadata or None)
    encoded, header = encode_header(wanted, metadata)
    assert library[: len(encoded)] == encoded
    assert header.file_size == len(library)


@given(specs, st.dictionaries(names, names, max_size=3))
def test_reads_what_the_library_writes(
    wanted: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = {name: random_tensor(*spec, n) for n, (name, spec) in enumerate(wanted.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = on_disk(Path(folder) / "x", safetensors.torch.save(tensors, metadata or None))
        file = open_tensors(path)
        assert file.header.metadata == metadata
        assert {name: (slot.dtype, slot.shape) for name, slot in file.header.tensors.items()} == wanted
        assert all(same_bits(file.tensor(name), tensors[name]) for name in tensors)


def test_every_storable_dtype_is_in_the_differential() -> None:
    wanted = {dtype: (dtype, (2,)) for dtype in STORABLE}
    library = safetensors.torch.save({dtype: random_tensor(dtype, (2,), 0) for dtype in STORABLE})
    encoded, _ = encode_header(wanted, {})
    assert library[: len(encoded)] == encoded


@given(specs)
def test_order_of_arguments_does_not_matter(wanted: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    backwards = dict(reversed(wanted.items()))
    assert encode_header(wanted, {"a": "1", "b": "2"}) == encode_header(backwards, {"b": "2", "a": "1"})


@given(specs)
def test_tensors_lie_aligned_and_gapless(wanted: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    _, header = encode_header(wanted, {"format": "pt"})
    position = 0
    assert header.data_start % 8 == 0
    for slot in header.tensors.values():
        assert slot.begin == position
        assert slot.begin % getattr(torch, slot.dtype).itemsize == 0
        position = slot.end


def test_four_bit_tensors_of_others_can_be_listed(tmp_path: Path) -> None:
    packed = torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    path = on_disk(tmp_path / "x", safetensors.torch.save({"q": packed}))
    assert read_header(path).tensors == {"q": Slot("float4_e2m1fn", (3, 4), 0, 6)}
    with pytest.raises(FileError, match="tensor 'q' is float4_e2m1fn, which this torch cannot hold"):
        open_tensors(path).tensor("q")


def test_tensors_that_lie_unaligned_are_handed_out_aligned(tmp_path: Path) -> None:
    document = json.dumps({"a": tensor(1, 9), "b": tensor(0, 1, "U8", [1])}).encode()
    data = bytes([7]) + bytes(torch.tensor([1.5, -2.5]).view(torch.uint8).tolist())
    for padding in range(4):
        file = open_tensors(on_disk(tmp_path / "x", file_of(document + b" " * padding, data)))
        assert file.tensor("a").tolist() == [1.5, -2.5]
        assert file.tensor("b").tolist() == [7]
        assert file.tensor("a").data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"x": ("complex128", (1,))}, "tensor 'x' is complex128, which a safetensors file cannot hold"),
        ({"__metadata__": ("float32", (1,))}, "cannot be named '__metadata__'"),
        ({"\ud800": ("float32", (1,))}, "not valid Unicode"),
        ({"x" * MAX_HEADER: ("float32", (1,))}, "a safetensors header ends at 100000000"),
    ],
)
def test_refuses_to_write(spec: dict[str, tuple[str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(FileError, match=message):
        encode_header(spec, {})


FAULTS = {
    "the file is empty": b"",
    "7 bytes are too few": b"\0" * 7,
    "begin with a header of 0 bytes": b"\0" * 64,
    "begin with a header of 100000001 bytes": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "begin with a header of 18446744073709551615 bytes": b"\xff" * 64,
    "begin with a header of 2338328219631577172 bytes": b"This is a text file.",
    "a header of 40 bytes in a file of 10": (40).to_bytes(8, "little") + b"{}",
    "its header is no JSON object": file_of([1]),
    "the header is not UTF-8 .byte 2.": file_of(b'{"\xff": 1}'),
    "the header is not valid JSON: Expecting": file_of(b'{"a" 1}'),
    "the header is not valid JSON: Extra data": file_of(b"{}{}"),
    "the key 'a' stands there twice": file_of(b'{"a": 1, "a": 1}'),
    "the key 'dtype' stands there twice": file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
    "NaN is no number": file_of(b'{"a": NaN}'),
    "nested too deeply": file_of(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "the header is not valid JSON: Exceeds the limit": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "'__metadata__' is not a map": file_of({"__metadata__": {"a": 1}}),
    "tensor 'a': its entry must hold": file_of({"a": 1}),
    "tensor 'b': its entry must hold": file_of({"b": tensor() | {"more": 1}}, b"\0" * 8),
    "tensor 'a': its dtype 'F31' is not known": file_of({"a": tensor(dtype="F31")}, b"\0" * 8),
    "tensor 'a': its shape is not": file_of({"a": tensor(shape=[-2])}, b"\0" * 8),
    "tensor 'b': its shape is not": file_of({"b": tensor(shape=[True, 2])}, b"\0" * 8),
    "tensor 'c': its shape is not": file_of({"c": tensor(shape=[2.0])}, b"\0" * 8),
    "tensor 'd': its shape is not": file_of({"d": tensor(0, 0, shape=[2**40, 2**40, 0])}),
    "tensor 'e': its shape is not": file_of({"e": tensor(shape=[1] * 64 + [2])}, b"\0" * 8),
    "tensor 'a': its data_offsets are not": file_of({"a": tensor(8, 0)}, b"\0" * 8),
    "tensor 'b': its data_offsets are not": file_of({"b": tensor(-8, 0)}, b"\0" * 8),
    "tensor 'a': shape .3. in F32 is 12 bytes, its data_offsets span 8": file_of({"a": tensor(shape=[3])}, b"\0" * 8),
    "does not end on a whole byte": file_of({"a": tensor(0, 1, "F4", [1])}, b"\0"),
    "tensor 'b': at byte 4 it overlaps": file_of({"a": tensor(), "b": tensor(4, 12)}, b"\0" * 12),
    "tensor 'b': at byte 12 it leaves a hole": file_of({"a": tensor(), "b": tensor(12, 20)}, b"\0" * 20),
    "tensor 'c': at byte 4 it leaves a hole": file_of({"c": tensor(4, 12)}, b"\0" * 12),
    "its tensors take 8 bytes, 7 are there": file_of({"a": tensor()}, b"\0" * 7),
    "3 bytes follow the last tensor": file_of({"a": tensor()}, b"\0" * 8, tail=b"abc"),
    r"tensor '\\ud800': its name is not valid Unicode": file_of({"\ud800": tensor()}, b"\0" * 8),
    r"tensor '\\n.{40,60}\.\.\..{40,60}': its entry": file_of({"\n" * 5000: 1}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_is_one_clear_line(message: str, tmp_path: Path) -> None:
    path = on_disk(tmp_path / "x.safetensors", FAULTS[message])
    with pytest.raises(FileError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250 + len(str(path))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "is no regular file"),
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / "nul\0", "null byte"),
    ]:
        with pytest.raises(FileError, match=message):
            read_header(path)


def test_header_of_a_file_of_gigabytes_is_all_that_is_read(tmp_path: Path) -> None:
    wanted = {f"layer{n}.weight": ("float32", (2**18, 2**10)) for n in range(16)}
    encoded, header = encode_header(wanted, {"format": "pt"})
    path = on_disk(tmp_path / "big", encoded)
    os.truncate(path, header.file_size)  # a hole of 16 GiB; reading it would take seconds, holding it would fail
    tracemalloc.start()
    assert read_header(path) == header
    assert read_metadata(path) == {"format": "pt"}
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_changed_bytes_never_give_a_traceback(tmp_path: Path) -> None:
    wanted = {"a": ("float32", (2, 3)), "b": ("bool", ()), "é": ("int64", (0,))}
    encoded, header = encode_header(wanted, {"format": "pt", "k": "v"})
    whole = encoded + bytes(header.file_size - len(encoded))
    chance, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(encoded))
            changed[at : at + chance.randint(0, 2)] = bytes(chance.choices(b'0123456789{}[]",:-\xff\0 aF', k=1))
        try:
            read_header(on_disk(tmp_path / "x", bytes(changed)))
        except FileError:
            refused += 1
    assert refused > 300
