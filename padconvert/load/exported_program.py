"""The document of an exported program: what a `.pt2` file becomes, and what an artefact stores (`kind: graph`).

    {"version": 1, "inputs": [INPUT, …], "nodes": [NODE, …], "mutations": [[INPUT'S NAME, VALUE], …],
     "outputs": [VALUE, …], "call": {"names": [WORD, …], "given": TREE}, "returns": TREE,
     "classes": {MODULE'S NAME: ITS CLASS'S}, "ranges": see `exported_sizes`; it may be absent}
    INPUT  {"kind": "parameter" | "buffer" | "constant", "name", "target", "dtype", "shape", …}
           {"kind": "user", "name", "dtype", "shape", "dynamic", "symbols"} · {"kind": "value", "name", "value"}
    NODE   {"op": "aten.conv2d.default", "args": [VALUE, …], "kwargs": {WORD: VALUE}, "out": null | NAME | [NAME, …]}
    VALUE  null, true, 1, 2.5, "text" · [VALUE, …] · {"n": NAME} · {"f": "-inf"} · {"dtype": …} · {"device": "cpu"} · …
    TREE   see `exported_grammar.read_treespec`

One check for both origins. What passes holds names of tensors, operations off the written list, and numbers.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import fx, nn

from padconvert.errors import FileError, UnsafeError
from padconvert.load.exported_grammar import (
    EXPORT_AGAIN,
    MALFORMED,
    check_identifier,
    check_path,
    check_text,
    check_tree,
    shown,
)
from padconvert.load.exported_ops import is_allowed, operation
from padconvert.load.exported_sizes import check_sizes
from padconvert.load.reductions import DTYPE_BYTES

Json = dict[str, Any]

TENSORS = ("parameter", "buffer", "constant")
MAX_DOCUMENT = 64 << 20
#: of JSON: every comma and bracket becomes an object when it is read
MAX_MARKS = 3_000_000
_MAX_SIZE = 2**48
_MAX_INT = 2**63
_MAX_DIMENSIONS = 64
_MAX_DEPTH = 8
_KEYS = {"version", "inputs", "nodes", "mutations", "outputs", "call", "returns", "classes"}
_SPECIAL = ("inf", "-inf", "nan")
_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
_FIELDS = {
    "parameter": {"target", "dtype", "shape", "requires_grad"},
    "buffer": {"target", "dtype", "shape", "persistent"},
    "constant": {"target", "dtype", "shape"},
    "user": {"dtype", "shape", "dynamic"},
    "value": {"value"},
}


def check_document(document: object, where: str) -> Json:
    """The document itself, checked. Raises UnsafeError for a name or an operation that is not on the lists,
    FileError where it is damaged or contradicts itself."""
    check = _Check(where)
    try:
        return check.document(document)
    except MALFORMED as error:
        raise check.damaged(str(error)) from None


class _Check:
    def __init__(self, where: str) -> None:
        self.where = where
        self.names: set[str] = set()

    def damaged(self, what: object) -> FileError:
        return FileError(f"{self.where}: the exported program is damaged at {shown(what)}. {EXPORT_AGAIN}")

    def require(self, holds: bool, what: object) -> None:
        if not holds:
            raise self.damaged(what)

    def define(self, name: object) -> None:
        """A new name. Every name is given once."""
        self.require(check_identifier(name, "the name", self.where) not in self.names, name)
        self.names.add(str(name))

    def document(self, document: object) -> Json:
        self.require(isinstance(document, dict) and set(document) - {"ranges"} == _KEYS, "its keys")
        assert isinstance(document, dict)
        self.require(document["version"] == 1, document["version"])
        for given in document["inputs"]:
            self.input(given)
        check_sizes(document, self.require)
        check_targets([given["target"] for given in document["inputs"] if given["kind"] in TENSORS], self.where)
        for node in document["nodes"]:
            self.node(node)
        stored = {given["name"] for given in document["inputs"] if given["kind"] in TENSORS}
        for name, value in document["mutations"]:
            self.require(name in stored, name)
            self.value(value)
        for value in document["outputs"]:
            self.value(value)
        for path, name in document["classes"].items():
            check_path(path, "the module", self.where)
            check_identifier(name, "the class", self.where)
        self.calls(document)
        return document

    def input(self, given: Json) -> None:
        kind = given["kind"]
        self.require(isinstance(kind, str) and kind in _FIELDS, kind)
        self.require(set(given) - {"symbols"} == _FIELDS[kind] | {"kind", "name"}, given)
        self.define(given["name"])
        if kind == "value":
            self.require(not isinstance(given["value"], dict | list), given)
            self.value(given["value"])
            return
        self.require(given["dtype"] in DTYPE_BYTES, given["dtype"])
        sizes = given["shape"]
        plain = isinstance(sizes, list) and all(type(size) is int and 0 <= size < _MAX_SIZE for size in sizes)
        self.require(plain and len(sizes) <= _MAX_DIMENSIONS and math.prod(sizes) < _MAX_SIZE, sizes)
        if kind == "user":
            self.require(all(type(i) is int and 0 <= i < len(sizes) for i in given["dynamic"]), given["dynamic"])
        else:
            check_path(given["target"], "the tensor", self.where)
        flag = given.get("requires_grad", given.get("persistent", False))
        self.require(isinstance(flag, bool), flag)
        floating = given["dtype"].startswith(("float", "bfloat", "complex"))
        self.require(floating or not given.get("requires_grad"), given["name"])

    def node(self, node: Json) -> None:
        self.require(set(node) == {"op", "args", "kwargs", "out"}, node)
        op = node["op"]
        if not isinstance(op, str) or not is_allowed(op):
            raise UnsafeError(
                f"{self.where}: the operation {shown(op)} is not on the list of plain tensor operations. "
                "Export a model without operations of its own, or convert the module itself (torch.save)."
            )
        self.arguments(op, node["args"], node["kwargs"])
        self.result(node["out"])

    def arguments(self, op: str, args: list[Any], kwargs: Json) -> None:
        function = operation(op)
        if function is None:
            raise FileError(f"{self.where}: torch {torch.__version__} has no operation {shown(op)}. Update torch.")
        self.require(isinstance(args, list) and isinstance(kwargs, dict), op)
        for value in (*args, *kwargs.values()):
            self.value(value)
        if isinstance(function, torch._ops.OpOverload):
            given = function._schema.arguments
            names = [argument.name for argument in given]
            self.require(len(args) <= len(names) and set(kwargs) <= set(names[len(args) :]), op)
            for argument in given[: len(args)]:
                self.require(_fits(str(argument.type), args[names.index(argument.name)]), op)
        else:
            self.require(not kwargs, op)

    def result(self, out: object, depth: int = 0) -> None:
        if isinstance(out, list):
            self.require(depth < 2, out)
            for each in out:
                self.result(each, depth + 1)
        elif out is not None:
            self.define(out)

    def value(self, value: object, depth: int = 0) -> None:
        match value:
            case None | bool():
                pass
            case int():
                self.require(abs(value) < _MAX_INT, value)
            case float():
                self.require(math.isfinite(value), value)
            case str():
                check_text(value, self.where)
            case list():
                self.require(depth < _MAX_DEPTH, "nested lists")
                for each in value:
                    self.value(each, depth + 1)
            case dict():
                self.mark(value)
            case _:
                raise self.damaged(value)

    def mark(self, value: Json) -> None:
        key: str
        inner: Any
        key, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
        match key:
            case "n":
                self.require(isinstance(inner, str) and inner in self.names, inner)
            case "f":
                self.require(inner in _SPECIAL, inner)
            case "dtype":
                self.require(inner in DTYPE_BYTES, inner)
            case "memory_format":
                self.require(inner in _FORMATS, inner)
            case "layout":
                self.require(inner == "strided", inner)
            case "device":
                self.require(inner == "cpu", inner)
            case "c":
                self.require(isinstance(inner, list) and len(inner) == 2, inner)
                for each in inner:
                    self.value(each)
            case _:
                raise self.damaged(value)

    def calls(self, document: Json) -> None:
        """Inputs and outputs are as many as their trees have leaves, and a call's words are plain names."""
        call = document["call"]
        self.require(set(call) == {"names", "given"}, call)
        root, (positional, named) = call["given"]
        self.require((root, positional[0], named[0]) == ("tuple", "tuple", "dict"), call["given"])
        words = [check_identifier(key, "the argument", self.where) for key, _ in named[1]]
        users = [given for given in document["inputs"] if given["kind"] not in TENSORS]
        self.require(check_tree(call["given"], self.where) == len(users), call["given"])
        self.require(check_tree(document["returns"], self.where) == len(document["outputs"]), document["returns"])
        names = [check_identifier(name, "the argument", self.where) for name in call["names"]]
        self.require(len(set(names)) == len(names) and len(set(words)) == len(words), names)


def _fits(kind: str, value: object) -> bool:
    """Whether a value is of the kind of argument: a tensor is a name, or a number in its place; a list is no name."""
    if kind == "Tensor":
        return not isinstance(value, list | str | None)
    return not (kind.startswith("List[") and isinstance(value, dict) and "n" in value)


def check_targets(targets: list[str], where: str) -> None:
    """Raises FileError where two tensors' names cannot both be, or one would hide what every module has."""
    taken = set(targets)
    for target in targets:
        parts = target.split(".")
        inside = any(".".join(parts[:i]) in taken for i in range(1, len(parts)))
        hides = hasattr(fx.GraphModule, parts[0]) or any(hasattr(nn.Module, part) for part in parts[1:])
        if inside or hides:
            raise FileError(
                f"{where}: a tensor named {shown(target)} cannot be part of a module. Rename it and export again."
            )
    if len(taken) != len(targets):
        raise FileError(f"{where}: two tensors of the exported program have one name. {EXPORT_AGAIN}")


# ---- JSON, packed and plain --------------------------------------------------------------------------------------


def parse(data: bytes, what: str) -> Any:
    """JSON of bounded size, each key once. Raises FileError."""
    if len(data) > MAX_DOCUMENT or sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_MARKS:
        raise FileError(f"{what} is too large to be an exported program ({len(data)} bytes). {EXPORT_AGAIN}")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{what} is not valid JSON ({reason}). Save or download it again.") from None


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def packed(document: Json) -> Json:
    """The record of an artefact's manifest: {"kind": "graph", "version": 1, "program": base64 of zlib of JSON}."""
    text = json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return {"kind": "graph", "version": 1, "program": base64.b64encode(zlib.compress(text.encode(), 9)).decode()}


def unpacked(record: Mapping[str, Any], where: str) -> Json:
    """The checked document of such a record. Raises FileError where it is damaged, UnsafeError as `check_document`."""
    text = record.get("program")
    if set(record) != {"kind", "version", "program"} or record["version"] != 1 or not isinstance(text, str):
        raise FileError(f"{where} is of a form that is not known here; is a newer padconvert needed?")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_DOCUMENT + 1)
    except (binascii.Error, ValueError, zlib.error):
        raise FileError(f"{where} is damaged. Make the artefact again from its source.") from None
    if len(data) > MAX_DOCUMENT or not unpacker.eof or unpacker.unused_data:
        raise FileError(f"{where} is damaged: it does not end where it should. Make the artefact again.")
    return check_document(parse(data, where), where)
