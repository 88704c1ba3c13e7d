"""Hostile `.pt2` files, made out of a sound one: each asks for a file `canary` in the current directory, or lies.

`ATTACKS` maps a name to what writes the file and to the error that refuses it.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from padconvert.errors import FileError, UnsafeError

Members = dict[str, bytes]
Attack = Callable[[Path], None]
CALL = "__import__('pathlib').Path('canary').touch()"
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Small(nn.Module):
    """One of everything that a program can hold: parameters, a buffer, a constant, sizes, a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.shift = torch.tensor([1.0, 2.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.nn.functional.gelu(self.conv(x), approximate="tanh").mean((2, 3))
        return {"logits": self.head(hidden.reshape(x.shape[0], 4)) * self.scale + self.shift}


@functools.cache
def sound() -> tuple[tuple[str, bytes], ...]:
    """The members of a sound program's archive, without its top folder."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    program = torch.export.export(Small().eval(), (torch.randn(3, 3, 8, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return tuple((info.filename.partition("/")[2], archive.read(info)) for info in archive.infolist())


def write(path: Path, members: Members, *, compression: int = zipfile.ZIP_STORED, top: str = "model/") -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(top + name), data, compress_type=compression)


class Touch:
    """Unpickled, it touches the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def pickled(thing: object | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing or [Touch()], buffer)
    return buffer.getvalue()


def members(change: Callable[[Members], object]) -> Attack:
    """A file whose members are changed."""

    def make(path: Path) -> None:
        found = dict(sound())
        change(found)
        write(path, found)

    return make


def documents(name: str, change: Callable[[Any], object]) -> Attack:
    """A file of whose members one, a JSON document, is changed."""

    def edit(found: Members) -> None:
        document = json.loads(found[name])
        change(document)
        found[name] = json.dumps(document).encode()

    return members(edit)


def program(change: Callable[[Any], object]) -> Attack:
    return documents(PROGRAM, change)


def graph(change: Callable[[Any], object]) -> Attack:
    return program(lambda document: change(document["graph_module"]["graph"]))


def added(name: str, data: bytes) -> Attack:
    return members(lambda found: found.update({name: data}))


def node_of(graph: Any, word: str) -> Any:
    return next(node for node in graph["nodes"] if word in node["target"])


def target(name: str) -> Attack:
    """The program's gelu is another operation."""
    return graph(lambda graph: node_of(graph, "gelu").update(target=name))


def sizes(expression: str) -> Attack:
    def change(graph: Any) -> None:
        graph["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": {"as_int": 3}}}

    return graph_of(change)


def graph_of(change: Callable[[Any], object]) -> Attack:
    return graph(change)


def spec(which: str, kind: str, context: object, children: int = 1) -> Attack:
    """The inputs or outputs are held by a class."""
    leaf: dict[str, object] = {"type": None, "context": None, "children_spec": []}

    def change(document: Any) -> None:
        root = {"type": kind, "context": context, "children_spec": [leaf] * children}
        document["graph_module"]["module_call_graph"][0]["signature"][which] = json.dumps([1, root])

    return program(change)


def signature(change: Callable[[Any], object]) -> Attack:
    return program(lambda document: change(document["graph_module"]["module_call_graph"][0]["signature"]))


def renamed(old: str, new: str) -> Attack:
    """A name is another one, everywhere in the program."""

    def edit(found: Members) -> None:
        found[PROGRAM] = found[PROGRAM].replace(json.dumps(old).encode(), json.dumps(new).encode())

    return members(edit)


def weight(change: Callable[[Any], object], config: str = WEIGHTS) -> Attack:
    return documents(config, lambda document: change(next(iter(document["config"].values()))))


def pickled_payload(config: str, member: str, data: bytes) -> Attack:
    def edit(found: Members) -> None:
        document = json.loads(found[config])
        next(iter(document["config"].values())).update(use_pickle=True, path_name=member.rpartition("/")[2])
        found[config] = json.dumps(document).encode()
        found[member] = data

    return members(edit)


def old_layout(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", dict(sound())[PROGRAM])
        for part in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{part}.pt", pickled())


def twice(path: Path) -> None:
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in [*sound(), (PROGRAM, b"{}")]:
            archive.writestr(zipfile.ZipInfo(f"model/{name}"), data)


def after_the_end(path: Path) -> None:
    write(path, dict(sound()))
    path.write_bytes(path.read_bytes() + pickled())


def before_the_start(path: Path) -> None:
    write(path, dict(sound()))
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())


def input_kind(document: Any) -> None:
    given = {"arg": {"name": "x", "class_fqn": "__torch__.torch.classes.any.Thing"}, "custom_obj_name": "thing"}
    document["graph_module"]["signature"]["input_specs"][-1] = {"custom_obj": given}


# It is pasted twice, and the first time it opens the string that the second time closes.
PASTED = f'x=""", y={CALL}):\n    0 #'
ELF = b"\x7fELF\x02\x01\x01\0"
ENUM = {"__enum__": True, "fqn": "canary_module:Thing", "name": "A"}

ATTACKS: dict[str, tuple[Attack, type[Exception]]] = {
    # what torch unpickles
    "sample_inputs": (added(SAMPLES, pickled()), UnsafeError),
    "sample_inputs_bare": (added(SAMPLES, pickle.dumps(Touch())), UnsafeError),
    "legacy_weights": (added("data/weights/model.pt", pickled()), UnsafeError),
    "legacy_constants": (added("data/constants/model.pt", pickled()), UnsafeError),
    "pickled_weight": (pickled_payload(WEIGHTS, "data/weights/weight_0", pickled()), UnsafeError),
    "pickled_constant": (pickled_payload(CONSTANTS, "data/constants/tensor_0", pickled()), UnsafeError),
    "custom_object": (pickled_payload(CONSTANTS, "data/constants/custom_obj_0", pickled()), UnsafeError),
    "opaque_object": (
        pickled_payload(CONSTANTS, "data/constants/opaque_obj_0", pickle.dumps(Touch())), UnsafeError),
    "custom_object_as_input": (program(input_kind), UnsafeError),
    "old_layout": (old_layout, FileError),
    # what torch evaluates
    "size_that_calls": (sizes(CALL), UnsafeError),
    "size_in_strides": (graph(lambda g: g["tensor_values"]["x"]["strides"].__setitem__(
        0, {"as_expr": {"expr_str": CALL}})), UnsafeError),
    "size_of_a_number": (graph(lambda g: g["sym_int_values"].update(n={"as_expr": {"expr_str": CALL}})), UnsafeError),
    "size_of_a_truth": (graph(lambda g: g["sym_bool_values"].update(n={"as_expr": {"expr_str": CALL}})), UnsafeError),
    "size_with_an_attribute": (sizes("Symbol('s1').__class__.__mro__"), UnsafeError),
    "size_in_a_lambda": (sizes("(lambda: 1)()"), UnsafeError),
    "size_in_a_list": (sizes("[s1 for s1 in ()]"), UnsafeError),
    "size_of_another_symbol": (sizes("Symbol('x\\'); 1')"), UnsafeError),
    "size_that_imports": (sizes("sympify('1')"), UnsafeError),
    "size_that_never_ends": (sizes("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), UnsafeError),
    "size_of_a_huge_power": (sizes("9**999999999"), UnsafeError),
    "size_of_many_powers": (sizes("((9**8)**8)**8"), UnsafeError),
    "size_nested_deeply": (sizes("(" * 1000 + "s1" + ")" * 1000), UnsafeError),
    "size_added_up": (sizes("+".join(["s1"] * 2000)), UnsafeError),
    "range_of_a_call": (program(lambda d: d["range_constraints"].update({CALL: {"min_val": 0, "max_val": 1}})),
                        UnsafeError),
    # what torch imports
    "outputs_of_an_enum": (spec("out_spec", "builtins.dict", json.dumps([ENUM])), UnsafeError),
    "outputs_of_a_defaultdict": (
        spec("out_spec", "collections.defaultdict",
             {"default_factory_module": "canary_module", "default_factory_name": "x", "dict_context": ["logits"]}),
        UnsafeError),
    "outputs_of_any_class": (spec("out_spec", "canary_module.Thing", '["logits"]'), UnsafeError),
    "inputs_of_a_transformers_class": (spec("in_spec", "transformers.Any", '["x"]'), UnsafeError),
    "outputs_of_a_submodule": (program(lambda d: d["graph_module"]["module_call_graph"].append(
        {"fqn": "head", "signature": {"inputs": [], "outputs": [], "in_spec": "[1, {\"type\": \"os.system\", "
         "\"context\": null, \"children_spec\": []}]", "out_spec": "[]"}})), UnsafeError),
    # what torch pastes into code
    "argument_of_code": (signature(lambda s: s.update(forward_arg_names=[PASTED])), UnsafeError),
    "argument_of_a_keyword": (signature(lambda s: s.update(forward_arg_names=["import"])), UnsafeError),
    "input_of_code": (renamed("x", f"x={CALL}"), UnsafeError),
    "node_of_code": (renamed("conv2d", f"conv2d = {CALL}; y"), UnsafeError),
    "node_of_dunder": (renamed("conv2d", "__class__"), UnsafeError),
    "parameter_of_code": (renamed("head.weight", f"head.weight; {CALL}"), UnsafeError),
    "parameter_of_dunder": (renamed("head.weight", "__class__.weight"), UnsafeError),
    "parameter_that_hides_forward": (renamed("scale", "forward"), FileError),
    "parameter_inside_another": (renamed("scale", "head.weight.scale"), FileError),
    "word_of_code": (graph(lambda g: node_of(g, "gelu")["inputs"][1].update(arg={"as_string": f"', {CALL}, '"})),
                     UnsafeError),
    # what torch calls
    "operation_that_opens_files": (target("torch.ops.aten.from_file.default"), UnsafeError),
    "operation_that_writes_files": (target("torch.ops.aten.save.default"), UnsafeError),
    "operation_on_storages": (target("torch.ops.aten.set_.source_Tensor"), UnsafeError),
    "function_of_torch": (target("torch.hub.load"), UnsafeError),
    "module_inside_torch": (target("torch.serialization.os.system"), UnsafeError),
    "method_caller": (target("_operator.methodcaller"), UnsafeError),
    "operation_of_another_library": (target("torch.ops.canary_library.touch.default"), UnsafeError),
    "operation_of_an_extension": (target("#canary:touch"), UnsafeError),
    "higher_order_operation": (target("torch.ops.higher_order.cond"), UnsafeError),
    "overload_of_dunder": (target("torch.ops.aten.gelu.__class__"), UnsafeError),
    "operation_as_an_argument": (
        graph(lambda g: node_of(g, "gelu")["inputs"][1].update(arg={"as_operator": "torch.hub.load"})), UnsafeError),
    "compiled_library": (added("data/aotinductor/model/model.so", b"\x7fELF"), UnsafeError),
    # what is only ignored here
    "library_in_extra": (added("extra/run.so", ELF), UnsafeError),
    "library_in_extra_of_a_plain_name": (added("extra/notes", ELF), UnsafeError),
    "library_in_extra_called_text": (added("extra/notes.txt", ELF), UnsafeError),
    "windows_library_in_extra": (added("extra/run.dll", b"MZ\x90\0"), UnsafeError),
    "module_in_extra": (added("extra/hubconf.py", CALL.encode()), UnsafeError),
    "script_in_extra": (added("extra/setup", b"#!/bin/sh\ntouch canary\n"), UnsafeError),
    "pickle_in_extra": (added("extra/model.pt", pickled()), UnsafeError),
    "pickle_of_text_in_extra": (added("extra/model.txt", pickle.dumps(Touch(), protocol=0)), UnsafeError),
    "library_in_a_folder_of_extra": (added("extra/data/aotinductor/model.so", ELF), UnsafeError),
    "library_as_a_note": (added(".data/serialization_id", ELF + b"\0" * 100), UnsafeError),
    "library_as_a_short_note": (added("version", ELF), UnsafeError),
    "library_as_an_unread_weight": (added("data/weights/weight_99", ELF), UnsafeError),
    "library_as_an_unread_constant": (added("data/constants/tensor_99", ELF), UnsafeError),
    "library_beside_everything": (added("run.so", ELF), UnsafeError),
    "folder_of_another_loader": (added("xl_model_weights/model", b"1"), UnsafeError),
    # lies
    "another_member": (added("data/weights/run.py", b"1"), UnsafeError),
    "another_program": (added("models/other.json", b"{}"), UnsafeError),
    "member_outside": (added("../outside", b"1"), UnsafeError),
    "member_twice": (twice, UnsafeError),
    "compressed": (lambda path: write(path, dict(sound()), compression=zipfile.ZIP_DEFLATED), UnsafeError),
    "bytes_after_the_end": (after_the_end, UnsafeError),
    "bytes_before_the_start": (before_the_start, UnsafeError),
    "weight_outside": (weight(lambda w: w.update(path_name="../../weight_0")), FileError),
    "weight_too_large": (weight(lambda w: w["tensor_meta"]["sizes"].__setitem__(0, {"as_int": 2**40})), FileError),
    "weight_behind_its_end": (weight(lambda w: w["tensor_meta"].update(storage_offset={"as_int": 8})), FileError),
    "weight_of_negative_strides": (weight(lambda w: w["tensor_meta"]["strides"].__setitem__(0, {"as_int": -1})),
                                   FileError),
    "weight_of_a_size_that_calls": (
        weight(lambda w: w["tensor_meta"]["sizes"].__setitem__(0, {"as_expr": {"expr_str": CALL}})), FileError),
    "weight_of_another_dtype": (weight(lambda w: w["tensor_meta"].update(dtype=8)), FileError),
    "sparse_weight": (weight(lambda w: w["tensor_meta"].update(layout=1)), FileError),
    "constant_outside": (weight(lambda w: w.update(path_name="../weights/weight_0"), CONSTANTS), FileError),
    "weight_missing": (documents(WEIGHTS, lambda d: d["config"].pop("conv.weight")), UnsafeError),
    "another_schema": (program(lambda d: d["schema_version"].update(major=9)), FileError),
    "another_archive_version": (added("archive_version", b"1"), FileError),
    "no_program": (members(lambda found: found.pop(PROGRAM)), FileError),
    "key_twice": (members(lambda f: f.update({PROGRAM: b'{"graph_module": 1, "graph_module": 2}'})), FileError),
    "nested_without_end": (members(lambda f: f.update({PROGRAM: b"[" * 200_000})), FileError),
    "a_million_lists": (members(lambda f: f.update({PROGRAM: b"[" + b"[]," * 4_000_000 + b"0]"})), FileError),
    "not_json": (members(lambda f: f.update({PROGRAM: b"\xff\xfe"})), FileError),
    "another_value": (members(lambda f: f.update({PROGRAM: b"[1, 2]"})), FileError),
    "undefined_name": (graph(lambda g: node_of(g, "gelu")["inputs"][0].update(arg={"as_tensor": {"name": "nowhere"}})),
                       FileError),
    "one_name_twice": (renamed("gelu", "conv2d"), FileError),
}  # fmt: skip
