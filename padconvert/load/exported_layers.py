"""Convolution and linear calls in an exported graph → real modules under the names that their weights had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_ATEN = torch.ops.aten
_CONVOLUTIONS: dict[Any, int | None] = {
    _ATEN.conv1d.default: 1,
    _ATEN.conv1d.padding: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv2d.padding: 2,
    _ATEN.conv3d.default: 3,
    _ATEN.conv3d.padding: 3,
    _ATEN.convolution.default: None,  # of any number of dimensions
}
_CLASSES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a convolution or linear operation whose weight and bias are tensors of the model."""

    node: fx.Node
    weight: str
    bias: str | None
    options: Options  # () for a linear layer


def lift_(tree: nn.Module, graph: fx.Graph) -> None:
    """Change both in place. A weight that something else reads too, or that is called in different ways, stays in the
    graph, unless it has a second name to be a layer under (a tied head)."""
    parameters = dict(tree.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    of_one_weight: dict[int, list[Call]] = {}
    for node in graph.nodes:
        call = _call(node)
        if call is not None and call.weight in parameters:
            of_one_weight.setdefault(id(parameters[call.weight]), []).append(call)
    for calls in of_one_weight.values():
        _lift_weight_(tree, graph, calls, parameters, names)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _lift_weight_(
    tree: nn.Module,
    graph: fx.Graph,
    calls: list[Call],
    parameters: dict[str, nn.Parameter],
    names: dict[int, list[str]],
) -> None:
    """Lift all calls of one weight, if they are one layer's."""
    first = calls[0]
    weight = parameters[first.weight]
    bias = None if first.bias is None else parameters.get(first.bias)
    if first.bias is not None and bias is None:
        return
    alike = all(
        call.options == first.options and (None if call.bias is None else parameters.get(call.bias)) is bias
        for call in calls
    )
    prefixes = _prefixes(tree, names[id(weight)], weight, bias)
    others = _others(graph, calls, names[id(weight)])
    if not alike or not prefixes or (bias is not None and _others(graph, calls, names[id(bias)])):
        return
    if others:
        # whoever else reads the weight keeps reading it under its first name
        kept = next((name for name in names[id(weight)] if name != f"{prefixes[-1]}.weight"), None)
        if kept is None:
            return
        for node in others:
            node.target = kept
        prefixes = prefixes[-1:]
    layer = _layer(weight, bias, first.options)
    for prefix in prefixes:
        parent, _, leaf = prefix.rpartition(".")
        tree.get_submodule(parent).add_module(leaf, layer)
    for call in calls:
        with graph.inserting_before(call.node):
            # the input may have been lifted meanwhile, so it is read here
            given = call.node.args[0] if call.node.args else call.node.kwargs["input"]
            new = graph.call_module(prefixes[0], (given,))
        call.node.replace_all_uses_with(new)
        graph.erase_node(call.node)


def _others(graph: fx.Graph, calls: list[Call], names: list[str]) -> list[fx.Node]:
    """The places in the graph where one of these tensors is read by something else than these calls."""
    own = {call.node for call in calls}
    return [
        node for node in graph.nodes if node.op == "get_attr" and node.target in names and not set(node.users) <= own
    ]


def _prefixes(tree: nn.Module, names: list[str], weight: nn.Parameter, bias: nn.Parameter | None) -> list[str]:
    """The modules that hold just this weight and bias: where the layer was."""
    wanted = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    found = []
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        if leaf != "weight" or not prefix:
            continue
        holder = tree.get_submodule(prefix)
        own = holder._parameters
        same = own.keys() == wanted.keys() and all(own[key] is wanted[key] for key in wanted)
        if same and not holder._modules and not holder._buffers:
            found.append(prefix)
    return found


def _call(node: fx.Node) -> Call | None:
    """The node as a call, where it is one of a layer with constant options."""
    if node.op != "call_function" or (node.target not in _CONVOLUTIONS and node.target is not _ATEN.linear.default):
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    values |= dict(zip(values, node.args, strict=False)) | node.kwargs
    del values["input"]
    weight, bias = values.pop("weight"), values.pop("bias")
    if not _is_stored(weight) or (bias is not None and not _is_stored(bias)):
        return None
    if values.pop("transposed", False) or any(_holds_node(value) for value in values.values()):
        return None
    values.pop("output_padding", None)
    options = tuple(sorted((key, _plain(value)) for key, value in values.items()))
    return Call(node, weight.target, None if bias is None else bias.target, options)


def _is_stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _holds_node(value: Any) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(_holds_node(each) for each in value))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _layer(weight: nn.Parameter, bias: nn.Parameter | None, options: Options) -> nn.Module:
    """A layer that holds these very parameters."""
    given: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if not options:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], **given)
    else:
        spatial, call = weight.dim() - 2, dict(options)
        groups = int(call.pop("groups"))
        sizes = {key: _each(value, spatial) for key, value in call.items()}
        layer = _CLASSES[spatial](
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups, **sizes, **given
        )
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


def _each(value: Any, spatial: int) -> Any:
    """One number for every dimension; words stay."""
    if isinstance(value, str):
        return value
    numbers = value if isinstance(value, tuple) else (value,)
    return numbers * spatial if len(numbers) == 1 else numbers
