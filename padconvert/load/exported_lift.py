"""The document of an exported program → a module: a graph of torch's operations, in which every convolution and
linear call with a weight of its own is a real `nn.Conv*` or `nn.Linear` again, under the name that the weight had.

The graph is built from the checked document, node by node. torch's own loader is never called: it evaluates sizes,
imports classes and unpickles (design §9).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from padconvert.errors import FileError
from padconvert.export.sizes import Axis
from padconvert.load.exported_grammar import LEAF, check_tree
from padconvert.load.exported_inputs import known_inputs
from padconvert.load.exported_layers import lift_
from padconvert.load.exported_ops import operation
from padconvert.load.exported_program import TENSORS, Json, check_document, packed
from padconvert.load.exported_sizes import promised_axes
from padconvert.load.storages import torch_dtype
from padconvert.walk.spec import InputSpec, ProbeSpec

_ITEM = operator.getitem


class ExportedModule(fx.GraphModule):
    """A module made from an exported program. All its tensors stay, also those that its graph never reads.

    `document` is the program without its tensors; `known_inputs` what it was exported with, for a probe.
    """

    document: Json
    known_inputs: tuple[InputSpec, ...]

    def __init__(self, tree: nn.Module, graph: fx.Graph, document: Json) -> None:
        super().__init__(tree, graph, "ExportedModule")
        # GraphModule keeps only what its graph names, and in that order
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = tree.__dict__[table]
        self.document = document
        self.known_inputs = known_inputs(document)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModule:
        tree = nn.Module()
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            tree.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        twin = ExportedModule(tree, copy.deepcopy(self.graph), self.document)
        twin.training = self.training
        memo[id(self)] = twin
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedModule:
        """As every module's; the graph makes its own tensors where the module now is."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next((p.device for p in self.parameters()), None)
        if device is not None and _move_(self.graph, device):
            self.recompile()
        return self

    def architecture(self) -> Json:
        """The record that an artefact stores; `rebuild` of it and the tensors gives the module back."""
        return packed(self.document)

    def promised(self, probe: ProbeSpec) -> tuple[Axis, ...]:
        """The sizes of the probe's inputs that the program left open."""
        return promised_axes(self.document, probe)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Constants and buffers that are not in the state dict."""
        kept = self.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.named_buffers(remove_duplicate=False) if name not in kept}


def build_exported(
    document: Json, tensors: Mapping[str, Tensor], where: str, missing_ok: Collection[str] = ()
) -> ExportedModule:
    """The module of a document with these tensors, sharing their memory; equal objects become one parameter.

    Names in `missing_ok` that are absent become empty tensors on the meta device. Raises UnsafeError as
    `check_document` does, FileError where a tensor is absent or has another shape or dtype.
    """
    document = check_document(document, where)
    tree, making = nn.Module(), _Graph()
    made: dict[tuple[object, str], Tensor] = {}
    for given in document["inputs"]:
        if given["kind"] in TENSORS:
            _hold_(tree, given["target"], document["classes"])
            _register_(tree, given, _given(given, tensors, missing_ok, where), made)
            making.nodes[given["name"]] = making.graph.get_attr(given["target"])
    making.read(document)
    for node in list(making.graph.nodes):
        if node.op == "get_attr" and not node.users:
            making.graph.erase_node(node)
    lift_(tree, making.graph)
    return ExportedModule(tree, making.graph, document)


# ---- tensors -----------------------------------------------------------------------------------------------------


def _given(given: Json, tensors: Mapping[str, Tensor], missing_ok: Collection[str], where: str) -> Tensor:
    name, shape, dtype = given["target"], tuple(given["shape"]), torch_dtype(given["dtype"])
    tensor = tensors.get(name)
    if tensor is None and name in missing_ok:
        return torch.empty(shape, dtype=dtype, device="meta")
    if tensor is None:
        raise FileError(f"{where}: the program needs the tensor '{name}', which is not there. Make the file again.")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise FileError(f"{where}: the program needs '{name}' as {given['dtype']} {list(shape)}, but it is {found}.")
    return tensor


def _hold_(tree: nn.Module, target: str, classes: Mapping[str, str]) -> None:
    """Make the empty modules that a tensor's dotted name leads through. They have their classes' names, and nothing
    else of them: what a layer is for can be told from what its parents are called."""
    holder, parts = tree, target.split(".")[:-1]
    for i, part in enumerate(parts):
        if part not in holder._modules:
            name = classes.get(".".join(parts[: i + 1]), "Module")
            holder.add_module(part, type(name, (nn.Module,), {})())
        holder = holder.get_submodule(part)


def _register_(tree: nn.Module, given: Json, tensor: Tensor, made: dict[tuple[object, str], Tensor]) -> None:
    """Hang a tensor where its dotted name says. A tensor that comes under two names stays one parameter."""
    path, _, leaf = given["target"].rpartition(".")
    holder = tree.get_submodule(path)
    key = (given["target"] if tensor.is_meta else id(tensor), given["kind"])
    if given["kind"] == "parameter":
        if key not in made:
            made[key] = nn.Parameter(tensor.detach(), requires_grad=given["requires_grad"])
        holder.register_parameter(leaf, made[key])  # type: ignore[arg-type]
    else:
        made.setdefault(key, tensor.detach())
        holder.register_buffer(leaf, made[key], persistent=given.get("persistent", False))


# ---- the graph ---------------------------------------------------------------------------------------------------


@dataclass
class _Graph:
    """An fx graph in the making; `nodes` maps the document's names to what they are in it."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, Any] = field(default_factory=dict)

    def read(self, document: Json) -> None:
        users = [given for given in document["inputs"] if given["kind"] not in TENSORS]
        self._inputs(document["call"], users)
        for node in document["nodes"]:
            args = tuple(self.value(each) for each in node["args"])
            kwargs = {key: self.value(each) for key, each in node["kwargs"].items()}
            function = operation(node["op"])
            assert function is not None, "checked"
            name = node["out"] if isinstance(node["out"], str) else None
            self._name(node["out"], self.graph.create_node("call_function", function, args, kwargs, name))
        for name, value in document["mutations"]:
            self.graph.call_function(torch.ops.aten.copy_.default, (self.nodes[name], self.value(value)))
        leaves = iter([self.value(each) for each in document["outputs"]])
        self.graph.output(_nested(document["returns"], leaves))

    def _inputs(self, call: Json, users: list[Json]) -> None:
        """One argument for each that the program was exported with, taken apart into the tensors inside it."""
        _, [[_, positional], [_, named]] = call["given"]
        trees = [*positional, *(tree for _, tree in named)]
        words = call["names"]
        if len(words) != len(trees):
            words = [*(f"args_{i}" for i in range(len(positional))), *(key for key, _ in named)]
        leaves = iter(users)
        owned = [[next(leaves) for _ in range(check_tree(tree, "the call"))] for tree in trees]
        optional = _optional(trees, owned)
        for word, tree, own, may_be_left_out in zip(words, trees, owned, optional, strict=True):
            default = {"default_value": own[0]["value"]} if may_be_left_out else {}
            self._take_apart(tree, self.graph.placeholder(word, **default), iter(own))

    def _take_apart(self, tree: Any, node: fx.Node, leaves: Any) -> None:
        if tree == LEAF:
            given = next(leaves)
            self.nodes[given["name"]] = node
            return
        kind, children = tree
        keys = [key for key, _ in children] if kind == "dict" else list(range(len(children)))
        for key, child in zip(keys, children, strict=True):
            below = child[1] if kind == "dict" else child
            self._take_apart(below, self.graph.call_function(_ITEM, (node, key)), leaves)

    def value(self, value: Any) -> Any:
        """An argument of the document as fx and torch have it."""
        match value:
            case list():
                return [self.value(each) for each in value]
            case {"n": name}:
                return self.nodes[name]
            case {"f": text}:
                return float(text)
            case {"dtype": name} | {"memory_format": name} | {"layout": name}:
                return getattr(torch, name)
            case {"device": name}:
                return torch.device(name)
            case {"c": [real, imaginary]}:
                return complex(self.value(real), self.value(imaginary))
            case _:
                return value

    def _name(self, out: Any, node: fx.Node) -> None:
        """Give an operation's results their names; of several, each is taken out of the tuple."""
        if isinstance(out, str):
            self.nodes[out] = node
        elif isinstance(out, list):
            for i, each in enumerate(out):
                if each is not None:
                    self._name(each, self.graph.call_function(_ITEM, (node, i)))


def _optional(trees: list[Any], owned: list[list[Json]]) -> list[bool]:
    """Which arguments may be left out: those after the last tensor, for the program holds their values anyway."""
    fixed = [tree == LEAF and own[0]["kind"] == "value" for tree, own in zip(trees, owned, strict=True)]
    return [all(fixed[i:]) for i in range(len(fixed))]


def _move_(graph: fx.Graph, device: torch.device) -> bool:
    """Let the graph make its own tensors on this device; whether that changed anything."""
    changed = False

    def moved(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed = True
            return device
        return value

    for node in graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
    return changed


def _nested(tree: Any, leaves: Any) -> Any:
    """Leaves in their places: tuples, lists and dicts."""
    if tree == LEAF:
        return next(leaves)
    kind, children = tree
    if kind == "dict":
        return {key: _nested(child, leaves) for key, child in children}
    nested = [_nested(child, leaves) for child in children]
    return tuple(nested) if kind == "tuple" else nested
