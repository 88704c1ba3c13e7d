"""Hostile `.pt2` files, and artefacts that describe a hostile graph: each is refused, without any effect."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from exported_attacks import ATTACKS, CALL, PROGRAM, graph, program, renamed, sizes, sound, write
from padconvert import ConvertOptions
from padconvert.__main__ import main
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.write import write_checkpoint
from padconvert.convert import convert
from padconvert.errors import FileError, UnsafeError
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.audit import audit
from padconvert.load.examine import examine
from padconvert.load.exported_grammar import check_expression
from padconvert.load.exported_ops import ATEN
from padconvert.load.exported_program import MAX_DOCUMENT, packed, unpacked

SECONDS = 5


@pytest.fixture
def place(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module that whoever imports it leaves a trace by."""
    (in_tmp / "canary_module.py").write_text(f"{CALL}\nclass Thing: A = 1\nx = dict\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(in_tmp))
    monkeypatch.delitem(sys.modules, "canary_module", raising=False)
    return in_tmp


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_hostile_program_is_refused_and_has_no_effect(name: str, place: Path) -> None:
    make, error = ATTACKS[name]
    path = place / "model.pt2"
    make(path)
    start = time.monotonic()
    with pytest.raises(error) as raised:
        open_source(path)
    assert time.monotonic() - start < SECONDS
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 700
    with contextlib.suppress(FileError):
        assert audit(path).verdict != "loads"
    assert not (place / "canary").exists()


def test_the_sound_program_loads(place: Path) -> None:
    """So the refusals above are about what was changed."""
    write(place / "model.pt2", dict(sound()))
    module = open_source(place / "model.pt2").module
    assert module is not None
    theirs = torch.export.load(place / "model.pt2").module()
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(module(x)["logits"], theirs(x)["logits"])
    assert audit(place / "model.pt2").verdict == "loads"


def test_text_beside_a_program_is_left_unread(place: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),))
    extra = {"notes": "trained in May, Größe 2.\n", "labels.json": '["a", "b"]', "sub/card.md": "# A model.\n\tFine."}
    torch.export.save(program, place / "model.pt2", extra_files=extra)
    assert open_source(place / "model.pt2").module is not None
    assert audit(place / "model.pt2").verdict == "loads"


@pytest.mark.parametrize("name", [name for name in ATTACKS if "library" in name])
def test_an_audit_refuses_what_loading_refuses(name: str, place: Path) -> None:
    ATTACKS[name][0](place / "model.pt2")
    report = audit(place / "model.pt2")
    assert report.unsafe
    assert examine(place / "model.pt2").verdict == "refused"
    assert main(["inspect", str(place / "model.pt2"), "--audit"]) == UnsafeError.exit_code
    with pytest.raises(UnsafeError) as raised:
        open_source(place / "model.pt2")
    assert str(raised.value) == report.verdict


ALIVE = [
    "sample_inputs", "pickled_weight", "pickled_constant", "legacy_weights", "opaque_object", "size_that_calls",
    "outputs_of_an_enum", "outputs_of_a_defaultdict", "argument_of_code",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALIVE)
def test_the_canary_is_alive(name: str, place: Path) -> None:
    """The attacks work on torch's own loader."""
    ATTACKS[name][0](place / "model.pt2")
    with contextlib.suppress(Exception):
        module = torch.export.load(place / "model.pt2").module(check_guards=False)
        module(torch.randn(3, 3, 8, 8))
    assert (place / "canary").exists()


@pytest.mark.parametrize(
    "make",
    [
        program(lambda document: document.update(guards_code=[CALL])),
        program(lambda document: document["graph_module"]["metadata"].update(custom=json.dumps(CALL))),
        graph(lambda graph: graph["nodes"][0]["metadata"].update(stack_trace=CALL, nn_module_stack=f"a,b,{CALL}")),
        graph(lambda graph: graph["nodes"][0]["metadata"].update(source_fn_stack="x,torch.hub.load")),
    ],
    ids=["guards", "metadata", "stack_traces", "source_functions"],
)
def test_what_is_never_read_has_no_effect(make: Callable[[Path], None], place: Path) -> None:
    make(place / "model.pt2")
    module = open_source(place / "model.pt2").module
    assert module is not None
    assert module(torch.randn(2, 3, 8, 8))["logits"].shape == (2, 2)
    assert CALL not in json.dumps(module.document)
    assert not (place / "canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))",
        "FloorDiv(Add(Symbol('s53', integer=True), Integer(1)), Integer(2))",
        "Pow(Symbol('s53', positive=True, integer=True), Integer(2))",
        "Max(Integer(1), Symbol('u0', integer=True))",
        "Mul(Float('0.5', precision=53), Symbol('zuf1', real=True))",
        "Equality(Symbol('s1', positive=True, integer=True), Integer(3))",
        "2*s0 + 1",
    ],
)
def test_sizes_as_torch_writes_them_pass(text: str) -> None:
    assert check_expression(text, "here") == text


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_other_text_is_no_size(text: str) -> None:
    with contextlib.suppress(UnsafeError):
        check_expression(text, "here")
        assert not set(text) & set('[]{}:;@\\"_')


def test_every_operation_of_the_list_exists_and_none_reaches_outside() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in ATEN)
    for forbidden in ("from_file", "save", "set_", "set", "as_strided", "resize_", "_print", "frombuffer", "tensor"):
        assert forbidden not in ATEN


# ---- an artefact ---------------------------------------------------------------------------------------------------


@pytest.fixture
def artefact(place: Path) -> Path:
    write(place / "model.pt2", dict(sound()))
    convert(place / "model.pt2", ConvertOptions(sets=("rules=[{name: '*', convert: true}]",)))
    return place / "model.pad.safetensors"


def forge_(path: Path, architecture: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(path)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors().items()}
    manifest = dataclasses.replace(checkpoint.manifest, architecture=architecture)
    write_checkpoint(path, tensors, manifest, force=True)


FORGERIES: dict[str, tuple[Callable[[Any], object], type[Exception]]] = {
    "operation": (lambda d: d["nodes"][0].update(op="aten.from_file.default"), UnsafeError),
    "function": (lambda d: d["nodes"][0].update(op="torch.hub.load"), UnsafeError),
    "name": (lambda d: d["nodes"][0].update(out=f"x = {CALL}"), UnsafeError),
    "argument": (lambda d: d["call"].update(names=[f"x={CALL}"]), UnsafeError),
    "target": (lambda d: d["inputs"][0].update(target=f"a; {CALL}"), UnsafeError),
    "word": (lambda d: d["nodes"][1]["kwargs"].update(approximate=f"' + {CALL} + '"), UnsafeError),
    "key": (lambda d: d["returns"][1][0].__setitem__(0, f"'] {CALL}"), UnsafeError),
    "mark": (lambda d: d["nodes"][0]["args"].append({"call": CALL}), FileError),
    "dtype": (lambda d: d["nodes"][0]["args"].append({"dtype": "hub"}), FileError),
    "device": (lambda d: d["nodes"][0]["args"].append({"device": "cuda:99"}), FileError),
    "class": (lambda d: d["classes"].update({"conv": f"Conv2d; {CALL}"}), UnsafeError),
    "module": (lambda d: d["classes"].update({"__class__": "Conv2d"}), UnsafeError),
    "shape": (lambda d: d["inputs"][0]["shape"].__setitem__(0, 2**62), FileError),
    "other_shape": (lambda d: d["inputs"][4]["shape"].__setitem__(0, 5), FileError),
    "hidden_method": (lambda d: d["inputs"][4].update(target="forward"), FileError),
    "missing_tensor": (lambda d: d["inputs"][4].update(target="nowhere"), FileError),
    "keyword": (lambda d: d["nodes"][0]["kwargs"].update({"a=1, **b": 1}), FileError),
    "more_outputs": (lambda d: d["outputs"].append(None), FileError),
    "symbol_of_code": (lambda d: d["inputs"][-1]["symbols"][0].__setitem__(1, CALL), FileError),
    "symbol_without_a_range": (lambda d: d["ranges"].clear(), FileError),
    "symbol_of_no_dimension": (lambda d: d["inputs"][-1]["symbols"][0].__setitem__(0, 3), FileError),
    "symbol_times_zero": (lambda d: d["inputs"][-1]["symbols"][0].__setitem__(2, 0), FileError),
    "symbol_of_a_weight": (lambda d: d["inputs"][0].update(symbols=d["inputs"][-1]["symbols"]), FileError),
    "range_of_code": (lambda d: d["ranges"].update({CALL: [0, 1]}), FileError),
    "range_upside_down": (lambda d: d["ranges"].update(s9=[3, 2]), FileError),
    "ranges_of_another_type": (lambda d: d.update(ranges=7), FileError),
    "no_nodes": (lambda d: d.pop("nodes"), FileError),
    "nodes_of_another_type": (lambda d: d.update(nodes=7), FileError),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORGERIES))
def test_a_forged_graph_in_an_artefact_is_refused(name: str, artefact: Path, place: Path) -> None:
    change, error = FORGERIES[name]
    document = copy.deepcopy(unpacked(read_checkpoint(artefact).manifest.architecture, "here"))
    change(document)
    forge_(artefact, packed(document))
    with pytest.raises(error) as raised:
        load(artefact)
    assert "\n" not in str(raised.value)
    assert not (place / "canary").exists()


def test_a_graph_that_unpacks_without_end_is_refused(artefact: Path) -> None:
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(b" " * (MAX_DOCUMENT + 10), 9)).decode()
    forge_(artefact, {"kind": "graph", "version": 1, "program": bomb})
    with pytest.raises(FileError, match="does not end where it should"):
        load(artefact)
    for record in ({"kind": "graph"}, {"kind": "graph", "version": 2, "program": ""}, {"kind": "graph", "version": 1}):
        forge_(artefact, dict(record))
        with pytest.raises(FileError, match="newer padconvert"):
            load(artefact)


# ---- anything else -------------------------------------------------------------------------------------------------


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a JSON document."""
    found: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
    return found


VALUES: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1.5,
    "",
    "x",
    CALL,
    [],
    {},
    [[]],
    {"as_int": 1},
    {"n": "x"},
    "torch.ops.aten.relu.default",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.sampled_from(VALUES))
def test_a_changed_value_never_ends_in_a_traceback(place: Path, at: int, value: Any) -> None:
    found = dict(sound())
    document = json.loads(found[PROGRAM])
    spots = places(document)
    holder, key = spots[at % len(spots)]
    holder[key] = value
    write(place / "model.pt2", found | {PROGRAM: json.dumps(document).encode()})
    # it still loads, or is refused in one of two ways; any other exception fails the test
    with contextlib.suppress(FileError, UnsafeError):
        assert open_source(place / "model.pt2", hash=False).kind == "exported"
    assert not (place / "canary").exists()


def test_every_cut_of_a_program_is_one_clear_line(place: Path) -> None:
    write(place / "whole.pt2", dict(sound()))
    whole = (place / "whole.pt2").read_bytes()
    for length in range(0, len(whole), 997):
        (place / "cut.pt2").write_bytes(whole[:length])
        # where the archive of the sample inputs ends, that end is taken for the file's
        with pytest.raises((FileError, UnsafeError)) as raised:
            open_source(place / "cut.pt2")
        assert "\n" not in str(raised.value)


def test_an_audit_names_what_is_refused(place: Path) -> None:
    sizes(CALL)(place / "model.pt2")
    report = audit(place / "model.pt2")
    assert report.refused == [f"size {CALL}"]
    ATTACKS["operation_that_opens_files"][0](place / "model.pt2")
    assert audit(place / "model.pt2").refused == ["operation torch.ops.aten.from_file.default"]
    ATTACKS["compiled_library"][0](place / "model.pt2")
    assert audit(place / "model.pt2").refused == ["member model/data/aotinductor/model/model.so"]
    renamed("x", f"x={CALL}")(place / "model.pt2")
    assert "is not a plain name" in audit(place / "model.pt2").verdict
