"""What a file would ask of whoever loads it: every name in it, and whether the reader would take it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from padconvert.checkpoint.fill import all_names_inside
from padconvert.checkpoint.header import read_header
from padconvert.checkpoint.layout import join
from padconvert.checkpoint.read import read_checkpoint
from padconvert.errors import FileError, UnsafeError
from padconvert.load import rebuild
from padconvert.load.build import build
from padconvert.load.detect import InputKind, detect, refusal
from padconvert.load.directory import load_directory
from padconvert.load.directory_class import class_named
from padconvert.load.directory_files import read_directory
from padconvert.load.exported import audit_exported, load_exported
from padconvert.load.factory import check_factory_trusted
from padconvert.load.names import check_names, check_trust, refused_names
from padconvert.load.nodes import NameNode, ObjectNode, TensorNode
from padconvert.load.pickled_file import view_of
from padconvert.load.reader import Pickled, read
from padconvert.load.skeleton_json import decode
from padconvert.load.state_dict import find_network
from padconvert.load.storages import torch_dtype


@dataclass(frozen=True, slots=True)
class Audit:
    """`names`: every class and function the file mentions (of an exported program: every member, operation and size);
    `refused`: those that nobody allows; `verdict`: "loads", or the message with which loading would stop; `unsafe`:
    whether it would stop for safety's sake, and not because the file is damaged."""

    kind: str
    names: list[str]
    refused: list[str]
    verdict: str
    unsafe: bool = False


def audit(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> Audit:
    """Reads a file as loading would, from the same tree of the same bytes, but keeps nothing and maps no tensor.

    Raises FileError for a file that no reader here takes.
    """
    place, packages = Path(path), check_trust(trust)
    kind = detect(place)
    match kind:
        case InputKind.PICKLE:
            return _audit_pickle(place, packages)
        case InputKind.SAFETENSORS:
            read_header(place)
            return Audit(kind.value, [], [], "loads")
        case InputKind.ARTEFACT:
            return _audit_artefact(place, packages)
        case InputKind.EXPORTED:
            return _audit_exported(place)
        case InputKind.TRANSFORMERS:
            return _audit_directory(place, packages)
        case _:
            raise refusal(kind, place)


def _audit_directory(folder: Path, trust: tuple[str, ...]) -> Audit:
    """Each weight file by itself first, so that the report lists what they name; then the directory as it is loaded.
    Of the code that came with the model only the files' names are read."""
    names: list[str] = []
    refused: list[str] = []
    try:
        files = read_directory(folder)
        names += files.code
        of_weights = [_audit_pickle(path, trust) for path in files.shards if path.suffix == ".bin"]
        names += sorted({name for found in of_weights for name in found.names})
        refused += sorted({name for found in of_weights for name in found.refused})
        cls = class_named(files.config, str(folder))
        names.append(f"{cls.__module__}.{cls.__name__}")
        load_directory(folder, trust, intact=False)
    except (UnsafeError, FileError) as error:
        return Audit("transformers", names, refused, str(error), unsafe=isinstance(error, UnsafeError))
    return Audit("transformers", names, [], "loads")


def _audit_exported(path: Path) -> Audit:
    names, refused, verdict = audit_exported(path)
    try:
        load_exported(path)
    except UnsafeError:
        return Audit("exported", names, refused, verdict, unsafe=True)
    except FileError:
        pass  # the verdict says so
    return Audit("exported", names, refused, verdict)


def _audit_artefact(path: Path, trust: tuple[str, ...]) -> Audit:
    """A factory is code that is named, and never imported here; a skeleton is built from the file's mapped tensors."""
    checkpoint = read_checkpoint(path)
    architecture = checkpoint.manifest.architecture
    names: list[NameNode] = []
    try:
        match architecture.get("kind"):
            case "none":
                pass
            case "factory":
                module, _, function = str(architecture.get("ref")).partition(":")
                names = [NameNode(module, function)]
                check_factory_trusted(architecture, trust)
            case kind:
                if kind == "skeleton":
                    names = decode(architecture.get("skeleton"), str(path))[1]
                layers = [name for entry in checkpoint.manifest.layers for name in (entry.name, *entry.aliases)]
                absent = {join(name, part) for name in layers for part in ("weight", "bias")}
                inside = {name for entry in checkpoint.manifest.layers for name in all_names_inside(entry)}
                kept = {name: tensor for name, tensor in checkpoint.tensors().items() if name not in inside}
                built = rebuild(architecture, kept, trust, missing_ok=absent)
                if kind == "transformers":
                    names = [NameNode(type(built).__module__, type(built).__name__)]
    except UnsafeError as error:
        refused = names if architecture.get("kind") == "factory" else refused_names(names, trust)
        return Audit("artefact", _listed(names), _listed(refused), _named(error, path), unsafe=True)
    except FileError as error:
        raise FileError(_named(error, path)) from error
    return Audit("artefact", _listed(names), [], "loads")


def _named(error: Exception, path: Path) -> str:
    return f"{path}: {str(error).removeprefix(f'{path}: ')}"


def _listed(names: Iterable[NameNode]) -> list[str]:
    return sorted({name.full for name in names})


def _audit_pickle(path: Path, trust: tuple[str, ...]) -> Audit:
    met: list[NameNode] = []
    try:
        pickled = read(path, met)
    except UnsafeError as error:
        return Audit("pickle", _listed(met), _listed(refused_names(met, trust)), str(error), unsafe=True)
    except FileError:
        if found := _by_names(met, trust, str(path)):
            return found
        raise
    names = _listed(pickled.tree.names)
    return _by_names(pickled.tree.names, trust, str(path)) or _verdict(pickled, names, trust, str(path))


def _by_names(met: list[NameNode], trust: tuple[str, ...], where: str) -> Audit | None:
    """The verdict where a name is refused, whatever else is the matter with the file."""
    try:
        check_names(met, trust, where)
    except UnsafeError as error:
        return Audit("pickle", _listed(met), [name.full for name in refused_names(met, trust)], str(error), unsafe=True)
    return None


def _verdict(pickled: Pickled, names: list[str], trust: tuple[str, ...], where: str) -> Audit:
    kind = "pickle"
    try:
        found = find_network(pickled.tree.root, where)
        kind = found.kind
        if isinstance(found.node, ObjectNode):
            build(found.node, lambda node: _empty(pickled, node), trust, where)
        else:
            for _, value in found.node.pairs:
                if isinstance(value, TensorNode):
                    _empty(pickled, value)
    except (UnsafeError, FileError) as error:
        return Audit(kind, names, [], str(error), unsafe=isinstance(error, UnsafeError))
    return Audit(kind, names, [], "loads")


def _empty(pickled: Pickled, node: TensorNode) -> Tensor:
    """The tensor's shape and dtype alone, checked like the tensor itself."""
    view = view_of(pickled, node)
    pickled.storages.check_view(view)
    return torch.empty(view.size, dtype=torch_dtype(view.dtype), device="meta")
