"""torch's own JSON of an exported program → a flat document of our own, without anything that torch would evaluate.

What is left out: guards, source lines, metadata, sample inputs. What is resolved: the blocks that
`torch.no_grad()` and a switched-off autocast make, which are put in line. The document is checked by
`exported_program`, wherever it comes from; here only what the document cannot hold is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from padconvert.errors import FileError, UnsafeError
from padconvert.load.exported_grammar import (
    EXPORT_AGAIN,
    MALFORMED,
    MAX_DEPTH,
    check_expression,
    check_identifier,
    read_treespec,
    shown,
)
from padconvert.load.exported_ops import DROPPED, check_operators
from padconvert.load.exported_sizes import check_ranges, ranges_of, symbols_of

SCHEMA_MAJOR = 8
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2",
    31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7
_MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
_SPECIAL = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}
# "key,path,package.Class", as torch notes the modules around an operation
_MODULE = re.compile(r"[^,]*,(?P<path>[A-Za-z0-9_.\-]{1,500}),[\w.]*?\.?(?P<name>[A-Za-z][A-Za-z0-9_]{0,99})", re.ASCII)
_NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
BLOCKS = (_NO_GRAD, _AUTOCAST)

Json = dict[str, Any]


def document_of(program: object, where: str) -> Json:
    """The flat document of torch's JSON. Raises UnsafeError for what only torch's own, evaluating reader could load,
    FileError where the program is damaged or of another schema."""
    reader = _Reader(where)
    try:
        return reader.read(program)
    except MALFORMED as error:
        raise reader.damaged(str(error)) from None


def expressions_of(program: object) -> Iterator[object]:
    """Every size in torch's JSON that is written as an expression, wherever it stands."""
    stack = [program]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            if "expr_str" in found:
                yield found["expr_str"]
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def tensor_spec(meta: object, where: str) -> tuple[str, list[Any]]:
    """(dtype, sizes as torch writes them) of a tensor's description."""
    if not isinstance(meta, dict) or meta.get("layout") != _STRIDED or not isinstance(meta.get("sizes"), list):
        raise FileError(f"{where}: a tensor that is not a plain strided one is not supported. Export a dense model.")
    dtype = _DTYPES.get(meta["dtype"]) if type(meta.get("dtype")) is int else None
    if dtype is None:
        raise FileError(f"{where}: a tensor of dtype number {shown(meta.get('dtype'))} is not supported.")
    return dtype, meta["sizes"]


def plain_int(size: object, where: str) -> int:
    """A size that is a number. Raises FileError."""
    match size:
        case {"as_int": int(value), **rest} if not rest and type(value) is int:
            return value
        case _:
            raise FileError(f"{where}: the size {shown(size)} of a stored tensor is no number. {EXPORT_AGAIN}")


class _Reader:
    """Reads one program; `nodes` grows as the graph is read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.nodes: list[Json] = []
        self.values: Mapping[str, Any] = {}
        self.blocks = 0
        self.classes: dict[str, str] = {}

    def damaged(self, what: object) -> FileError:
        return FileError(f"{self.where}: the exported program is damaged at {shown(what)}. {EXPORT_AGAIN}")

    def part(self, holder: object, key: str, kind: type) -> Any:
        """`holder[key]`, which must be there and of this type."""
        if not isinstance(holder, dict) or type(holder.get(key)) is not kind:
            raise self.damaged(key)
        return holder[key]

    def union(self, holder: object) -> tuple[str, Any]:
        """The one tag of a tagged value, and the value."""
        if not isinstance(holder, dict) or len(holder) != 1:
            raise self.damaged(holder)
        return next(iter(holder.items()))

    def name(self, name: object) -> str:
        return check_identifier(name, "the name", self.where)

    # ---- the whole

    def read(self, program: object) -> Json:
        version = self.part(program, "schema_version", dict)
        if version.get("major") != SCHEMA_MAJOR:
            raise FileError(
                f"{self.where}: an exported program of schema {shown(version.get('major'))}; {SCHEMA_MAJOR} is known "
                "here. Export the model again with torch 2.11 or newer (torch.export.save)."
            )
        check_operators(self.part(program, "opset_version", dict).get("aten"), self.where)
        for expression in expressions_of(program):
            check_expression(expression, self.where)
        constraints = self.part(program, "range_constraints", dict)
        for symbol in constraints:
            check_expression(symbol, self.where)
        check_ranges(constraints, self.damaged)
        module = self.part(program, "graph_module", dict)
        graph, signature = self.part(module, "graph", dict), self.part(module, "signature", dict)
        self.values = self.part(graph, "tensor_values", dict)
        inputs = [self.input(i, spec) for i, spec in enumerate(self.part(signature, "input_specs", list))]
        scope: dict[str, Any] = {given["name"]: {"n": given["name"]} for given in inputs}
        self.graph(graph, scope, "", 0)
        specs = [self.output(spec, scope, inputs) for spec in self.part(signature, "output_specs", list)]
        return {
            "version": 1,
            "inputs": inputs,
            "nodes": self.nodes,
            "mutations": [value for kind, value in specs if kind == "mutation"],
            "outputs": [value for kind, value in specs if kind == "user"],
            "classes": self.classes,
            "ranges": ranges_of(constraints, inputs),
            **self.calls(self.part(module, "module_call_graph", list)),
        }

    def calls(self, entries: list[Any]) -> Json:
        """How the program is called and what it returns, of its own call; those of submodules are only checked."""
        found: Json | None = None
        for entry in entries:
            signature = entry.get("signature") if isinstance(entry, dict) else None
            if signature is None:
                continue
            given = read_treespec(self.part(signature, "in_spec", str), self.where, outputs=False)
            returned = read_treespec(self.part(signature, "out_spec", str), self.where, outputs=True)
            names = signature.get("forward_arg_names") or []
            if not isinstance(names, list):
                raise self.damaged("forward_arg_names")
            checked = [check_identifier(name, "the argument", self.where) for name in names]
            if found is None and entry.get("fqn") == "":
                found = {"call": {"names": checked, "given": given}, "returns": returned}
        if found is None:
            raise self.damaged("module_call_graph")
        return found

    # ---- inputs and outputs

    def input(self, index: int, spec: object) -> Json:
        kind, value = self.union(spec)
        match kind:
            case "parameter":
                return self.tensor(value, "parameter", value.get("parameter_name"))
            case "buffer":
                return self.tensor(value, "buffer", value.get("buffer_name"), self.part(value, "persistent", bool))
            case "tensor_constant":
                return self.tensor(value, "constant", value.get("tensor_constant_name"))
            case "user_input":
                return self.user_input(index, self.part(value, "arg", dict))
            case "constant_input":
                constant = self.argument(self.part(value, "value", dict), {})
                return {"kind": "value", "name": self.name(value.get("name") or f"value_{index}"), "value": constant}
            case _:
                raise UnsafeError(
                    f"{self.where}: it holds an object of a class of its own ({shown(kind)}), which torch would "
                    "unpickle. Export a model of plain tensors."
                )

    def tensor(self, spec: Json, kind: str, target: object, persistent: bool = False) -> Json:
        name = self.name(self.part(self.part(spec, "arg", dict), "name", str))
        dtype, sizes = tensor_spec(self.values.get(name), self.where)
        shape = [plain_int(size, self.where) for size in sizes]
        given: Json = {"kind": kind, "name": name, "target": target, "dtype": dtype, "shape": shape}
        if kind == "parameter":
            given["requires_grad"] = self.part(self.values[name], "requires_grad", bool)
        if kind == "buffer":
            given["persistent"] = persistent
        return given

    def user_input(self, index: int, arg: Json) -> Json:
        tag, value = self.union(arg)
        match tag:
            case "as_tensor":
                name = self.name(self.part(value, "name", str))
                dtype, sizes = tensor_spec(self.values.get(name), self.where)
                dynamic = [i for i, size in enumerate(sizes) if not isinstance(size, dict) or "as_int" not in size]
                shape = [self.hint(size) for size in sizes]
                return {
                    "kind": "user", "name": name, "dtype": dtype, "shape": shape, "dynamic": dynamic,
                    "symbols": symbols_of(sizes),
                }  # fmt: skip
            case "as_sym_int" | "as_sym_float" | "as_sym_bool":
                return {"kind": "value", "name": self.name(value.get("as_name")), "value": None}
            case _:
                return {"kind": "value", "name": f"value_{index}", "value": self.argument(arg, {})}

    def hint(self, size: object) -> int:
        """A size, or what it was when the program was exported."""
        match size:
            case {"as_int": int(value)} | {"as_expr": {"hint": {"as_int": int(value)}}} if 0 <= value < 2**31:
                return value
            case _:
                return 2

    def output(self, spec: object, scope: Mapping[str, Any], inputs: list[Json]) -> tuple[str, Any]:
        kind, value = self.union(spec)
        if kind == "user_output":
            return "user", self.argument(self.part(value, "arg", dict), scope)
        changed = {"buffer_mutation": "buffer_name", "parameter_mutation": "parameter_name"}.get(kind)
        if changed is not None:
            names = [given["name"] for given in inputs if given.get("target") == value.get(changed)]
            source = scope.get(self.part(self.part(value, "arg", dict), "name", str))
            if names and source is not None:
                return "mutation", [names[0], source]
        raise FileError(
            f"{self.where}: its output {shown(spec)} is of a kind that is not supported. Export the model for "
            "inference, in eval mode."
        )

    # ---- the graph

    def graph(self, graph: Json, scope: dict[str, Any], prefix: str, depth: int) -> None:
        """Append the nodes of a graph; `scope` maps the names that are known so far to what they stand for."""
        if depth > MAX_DEPTH:
            raise self.damaged("nested blocks")
        for node in self.part(graph, "nodes", list):
            target = self.part(node, "target", str)
            if target in BLOCKS:
                self.block(node, target, scope, depth)
                continue
            op = target.removeprefix("torch.ops.")
            if op not in DROPPED:
                self.nodes.append(self.node(node, op, scope, prefix))

    def node(self, node: Json, op: str, scope: dict[str, Any], prefix: str) -> Json:
        args: list[Any] = []
        kwargs: Json = {}
        for given in self.part(node, "inputs", list):
            value = self.argument(self.part(given, "arg", dict), scope)
            if given.get("kind") == 2:
                kwargs[check_identifier(given.get("name"), "the argument", self.where)] = value
            else:
                args.append(value)
        self.note_classes(node.get("metadata"))
        outputs = self.part(node, "outputs", list)
        out: Any = [self.result(each, scope, prefix) for each in outputs]
        if len(outputs) == 1:
            out = out[0]
        elif not outputs:
            out = None
        return {"op": op, "args": args, "kwargs": kwargs, "out": out}

    def note_classes(self, metadata: object) -> None:
        """The names of the classes that the operation's modules had: they tell an attention from a feed-forward."""
        stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
        for entry in stack.split(";") if isinstance(stack, str) else ():
            match = _MODULE.fullmatch(entry)
            if match is not None:
                self.classes.setdefault(match["path"], match["name"])

    def result(self, output: object, scope: dict[str, Any], prefix: str) -> Any:
        """The name, or list of names, that an operation's result gets."""
        tag, value = self.union(output)
        match tag:
            case "as_none":
                return None
            case "as_tensor":
                name = self.part(value, "name", str)
            case "as_sym_int" | "as_sym_float" | "as_sym_bool":
                name = self.part(value, "as_name", str)
            case "as_tensors":
                return [self.result({"as_tensor": each}, scope, prefix) for each in value]
            case _:
                raise self.damaged(output)
        new = prefix + self.name(name)
        scope[name] = {"n": new}
        return new

    def block(self, node: Json, target: str, scope: dict[str, Any], depth: int) -> None:
        """Put a block in line: its inputs are names of this scope, and its outputs become such."""
        inputs = [self.part(each, "arg", dict) for each in self.part(node, "inputs", list)]
        at = next((i for i, each in enumerate(inputs) if "as_graph" in each), None)
        if at is None or (target == _AUTOCAST and (at < 2 or inputs[2] != {"as_bool": False})):
            raise FileError(f"{self.where}: exported under autocast. Export the model without it.")
        graph = self.part(inputs[at]["as_graph"], "graph", dict)
        names = [self.part(self.union(each)[1], "name", str) for each in self.part(graph, "inputs", list)]
        given = [self.argument(each, scope) for each in inputs[at + 1 :]]
        if len(names) != len(given):
            raise self.damaged(names)
        inner: dict[str, Any] = dict(zip(names, given, strict=True))
        self.blocks += 1
        self.graph(graph, inner, f"block_{self.blocks}_", depth + 1)
        returned = [self.argument(each, inner) for each in self.part(graph, "outputs", list)]
        outer = [self.union(each) for each in self.part(node, "outputs", list)]
        if len(outer) == 1 and outer[0][0] == "as_tensors":
            outer = [("as_tensor", each) for each in outer[0][1]]
        if len(outer) != len(returned):
            raise self.damaged(outer)
        for (tag, name), value in zip(outer, returned, strict=True):
            if tag != "as_none":
                scope[self.name(name.get("name") or name.get("as_name"))] = value

    def argument(self, arg: object, scope: Mapping[str, Any]) -> Any:
        """An operation's argument: a plain value, {"n": name} of another node, or one of the document's few marks."""
        tag, value = self.union(arg)
        match tag:
            case "as_none":
                return None
            case "as_int" | "as_bool" | "as_string" | "as_ints" | "as_bools" | "as_strings" | "as_int_lists":
                return value
            case "as_float" | "as_floats" | "as_float_lists":
                return self.floats(value)
            case "as_tensor":
                return self.known(self.part(value, "name", str), scope)
            case "as_tensors" | "as_optional_tensors" | "as_nested_tensors":
                return self.tensors(value, scope)
            case "as_optional_tensor":
                return self.argument(value, scope)
            case "as_sym_int" | "as_sym_float" | "as_sym_bool":
                return self.number(value, scope)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
                return [self.number(each, scope) for each in value]
            case _:
                return self.mark(tag, value)

    def mark(self, tag: str, value: Any) -> Json:
        """dtypes, formats and devices. The program runs where its weights are, so a device is only marked as one."""
        if tag == "as_scalar_type" and value in _DTYPES:
            return {"dtype": _DTYPES[value]}
        if tag == "as_memory_format" and value in _MEMORY_FORMATS:
            return {"memory_format": _MEMORY_FORMATS[value]}
        if tag == "as_layout" and value == _STRIDED:
            return {"layout": "strided"}
        if tag == "as_device" and isinstance(value, dict):
            return {"device": "cpu"}
        if tag == "as_complex" and isinstance(value, dict):
            return {"c": [self.floats(value.get("real")), self.floats(value.get("imag"))]}
        raise UnsafeError(
            f"{self.where}: an argument {shown({tag: value})} is more than a tensor, a number or a word. {EXPORT_AGAIN}"
        )

    def floats(self, value: object) -> Any:
        match value:
            case list():
                return [self.floats(each) for each in value]
            case str() if value in _SPECIAL:
                return {"f": _SPECIAL[value]}
            case float() | int():
                return float(value)
            case _:
                raise self.damaged(value)

    def tensors(self, value: object, scope: Mapping[str, Any]) -> list[Any]:
        if not isinstance(value, list):
            raise self.damaged(value)
        found: list[Any] = []
        for each in value:
            match each:
                case list():
                    found.append(self.tensors(each, scope))
                case {"name": str(name)}:
                    found.append(self.known(name, scope))
                case _:
                    found.append(self.argument(each, scope))
        return found

    def number(self, value: object, scope: Mapping[str, Any]) -> Any:
        tag, inner = self.union(value)
        return self.known(inner, scope) if tag == "as_name" else inner

    def known(self, name: object, scope: Mapping[str, Any]) -> Any:
        if not isinstance(name, str) or name not in scope:
            raise self.damaged(name)
        return scope[name]
