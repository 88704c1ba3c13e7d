"""A module without its tensors, as JSON, and back: the same tree and the same rules as for a pickled file.

    {"version": 1, "root": VALUE, "objects": [OBJECT, …]}
    VALUE   null, true, 1, 2.5, "text" · [i], the object of that number · ["float", "nan"] · ["bytes", "00ff"]
    OBJECT  ["object", CLASS, STATE] · ["dict", [[KEY, VALUE], …]] · ["tensor", {"name", "dtype", "shape", …}] · …

Objects stand in the order in which they are met from the root, each once, so shared ones stay shared and the text is
the same from any process. Tensors are stored elsewhere, under their names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.errors import FileError, UnsafeError
from padconvert.load.build import build
from padconvert.load.machine import parse
from padconvert.load.names import check_names, check_trust
from padconvert.load.nodes import ObjectNode, Table, TableNode, TensorNode, Value, walk
from padconvert.load.skeleton_json import TensorSpec, decode, encode, keeps_stride
from padconvert.load.storages import torch_dtype

_WHERE = "the module"
_TENSOR_TYPES = (Tensor, nn.Parameter, nn.Buffer)
# They differ between processes or name a place on this machine, and no forward reads them.
_DROPPED = frozenset({"_original_object_hash"})
_BLANKED = frozenset({"_name_or_path", "name_or_path"})


def skeleton_of(module: nn.Module, trust: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The module's skeleton, and the tensors it needs that are not in the state dict, by names of their own.

    The module is not changed. Raises UnsafeError where it holds what the reader would refuse, FileError where it
    cannot be pickled.
    """
    numbered = _Numbered()
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.persistent_id = numbered.persistent_id  # type: ignore[method-assign]
    try:
        pickler.dump(module)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(f"{_WHERE} cannot be pickled ({reason}).") from error
    tree = parse(buffer.getvalue(), _WHERE, numbered=True)
    check_names(tree.names, check_trust(trust), _WHERE)
    names, extra = _name_tensors(module, numbered.tensors)
    specs = _specs(names, numbered.tensors)
    _make_stable_(tree.root, names, numbered.tensors)
    # what cannot be read back is found out now, not when the artefact is loaded
    build(tree.root, lambda node: _empty(specs[str(node.source)]), check_trust(trust), _WHERE)
    return encode(tree.root, specs), extra


class _Numbered:
    """Gives every tensor that the pickler meets a number."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}

    def persistent_id(self, thing: object) -> tuple[str, int] | None:
        if not isinstance(thing, Tensor):
            return None
        if type(thing) not in _TENSOR_TYPES:
            raise FileError(f"{_WHERE} holds a {type(thing).__name__}; only plain tensors and parameters are stored.")
        if id(thing) not in self.numbers:
            self.numbers[id(thing)] = len(self.tensors)
            self.tensors.append(thing)
        return ("tensor", self.numbers[id(thing)])


def _name_tensors(module: nn.Module, tensors: Sequence[Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """A name for each tensor: its own in the state dict, or where it hangs, or its number."""
    known = {id(tensor): name for name, tensor in reversed(module.state_dict(keep_vars=True).items())}
    hanging = {id(tensor): name for name, tensor in reversed(list(_hanging(module)))}
    taken = set(module.state_dict(keep_vars=True))
    names: list[str] = []
    extra: dict[str, Tensor] = {}
    for number, tensor in enumerate(tensors):
        name = known.get(id(tensor))
        if name is None:
            name = hanging.get(id(tensor), f"skeleton.{number}")
            while name in taken:
                name += "_"
            extra[name] = tensor.detach()
        taken.add(name)
        names.append(name)
    return names, extra


def _hanging(module: nn.Module) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = list(module.named_buffers(remove_duplicate=False))
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        found += [(dot + key, value) for key, value in vars(child).items() if isinstance(value, Tensor)]
    return found


def _specs(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, TensorSpec]:
    """What is written of each tensor, and of which earlier one it is a view."""
    specs: dict[str, TensorSpec] = {}
    bases: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        plain = tensor.detach()
        kept = not plain.is_contiguous() and keeps_stride(tuple(plain.shape), plain.stride())
        stride = tuple(plain.stride()) if kept else None
        base: tuple[str, int] | None = None
        pointer = 0 if plain.is_meta else plain.untyped_storage().data_ptr()
        if pointer and pointer in bases:
            base = _view_of(plain, *bases[pointer])
            stride = tuple(plain.stride()) if base else stride
        elif pointer and plain.is_contiguous():
            bases[pointer] = (name, plain)
        dtype = str(plain.dtype).removeprefix("torch.")
        specs[name] = TensorSpec(name, dtype, tuple(plain.shape), stride, base)
    return specs


def _view_of(view: Tensor, name: str, base: Tensor) -> tuple[str, int] | None:
    """(base, offset in entries) where all of a view lies inside an earlier tensor."""
    offset = int(view.storage_offset()) - int(base.storage_offset())
    last = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    inside = view.dtype == base.dtype and view.numel() > 0 and offset >= 0 and last < base.numel()
    return (name, offset) if inside else None


def _make_stable_(root: Value, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Tensors by name, with their attributes; nothing left that differs between processes or machines."""
    for node in walk(root):
        match node:
            case TensorNode(source=int(number)):
                tensor = tensors[number]
                node.source = names[number]
                node.parameter = isinstance(tensor, nn.Parameter)
                node.requires_grad = tensor.requires_grad and tensor.is_leaf
                pairs: list[tuple[Value, Value]] = [(key, _plain(value)) for key, value in vars(tensor).items()]
                node.state = TableNode(Table.DICT, pairs) if pairs else None
            case ObjectNode(state=TableNode() as state) if node.cls.module.startswith("transformers."):
                kept = [(key, value) for key, value in state.pairs if key not in _DROPPED]
                state.pairs = [
                    (key, "" if key in _BLANKED and isinstance(value, str) else value) for key, value in kept
                ]


def _plain(value: object) -> Value:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsafeError(f"{_WHERE} holds a tensor with an attribute that is a {type(value).__name__}.")


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")


def module_from(
    skeleton: object, tensors: Mapping[str, Tensor], trust: Sequence[str] = (), missing_ok: Collection[str] = ()
) -> nn.Module:
    """The module of a skeleton with these tensors, sharing their memory. Names in `missing_ok` that are absent become
    empty tensors on the meta device.

    Raises UnsafeError where it names what the reader refuses, FileError where it is damaged, or a tensor is absent or
    has another shape or dtype.
    """
    packages = check_trust(trust)
    where = "the artefact's skeleton"
    root, names, specs = decode(skeleton, where)
    check_names(names, packages, where)
    found: dict[str, Tensor] = {}
    for name, spec in specs.items():
        found[name] = _given(spec, tensors, missing_ok, where)
    for spec in specs.values():
        _share_(spec, found)
    module = build(root, lambda node: found[str(node.source)], packages, where)
    if not isinstance(module, nn.Module):
        raise FileError(f"{where} describes a {type(module).__name__}, not a module.")
    return module


def _given(spec: TensorSpec, tensors: Mapping[str, Tensor], missing_ok: Collection[str], where: str) -> Tensor:
    if spec.name not in tensors:
        if spec.name in missing_ok:
            return _empty(spec)
        raise FileError(f"{where} needs the tensor '{spec.name}', which is not there.")
    tensor = tensors[spec.name].detach()
    if tuple(tensor.shape) != spec.shape or tensor.dtype != torch_dtype(spec.dtype):
        found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
        raise FileError(f"{where} needs '{spec.name}' as {spec.dtype} {list(spec.shape)}, but it is {found}.")
    if spec.stride is not None and tensor.stride() != spec.stride and keeps_stride(spec.shape, spec.stride):
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor


def _share_(spec: TensorSpec, found: dict[str, Tensor]) -> None:
    """Makes a tensor a view of another again, as it was in the source, wherever their values still agree."""
    own = found[spec.name]
    if spec.base is None or spec.stride is None or own.is_meta or own.numel() == 0:
        return
    name, offset = spec.base
    base = found.get(name)
    if base is None or base.is_meta or base.dtype != own.dtype or not base.is_contiguous():
        return
    last = offset + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
    if last >= base.numel():
        return
    view = base.as_strided(spec.shape, spec.stride, base.storage_offset() + offset)
    if torch.equal(view, own):
        found[spec.name] = view


def tensors_needed(skeleton: object) -> frozenset[str]:
    """The names of the tensors that a skeleton is made of. Raises FileError where it is damaged."""
    _, _, specs = decode(skeleton, "the artefact's skeleton")
    return frozenset(specs)
