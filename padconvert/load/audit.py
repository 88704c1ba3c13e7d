"""What a file would ask of whoever loads it: every name in it, and whether the reader would take it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from padconvert.errors import FileError, UnsafeError
from padconvert.load.build import build
from padconvert.load.detect import InputKind, detect, refusal
from padconvert.load.exported import audit_exported
from padconvert.load.names import check_trust, refused_names
from padconvert.load.nodes import ObjectNode, TensorNode, View
from padconvert.load.reader import Pickled, read
from padconvert.load.state_dict import find_network
from padconvert.load.storages import check_view, torch_dtype


@dataclass(frozen=True, slots=True)
class Audit:
    """`names`: every class and function the file mentions (of an exported program: every member, operation and size);
    `refused`: those that nobody allows; `verdict`: "loads", or the message with which loading would stop."""

    kind: str
    names: list[str]
    refused: list[str]
    verdict: str


def audit(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> Audit:
    """Reads a file as loading would, from the same tree of the same bytes, but keeps nothing and maps no tensor.

    Raises FileError for a file that no reader here takes.
    """
    place, packages = Path(path), check_trust(trust)
    kind = detect(place)
    match kind:
        case InputKind.PICKLE:
            return _audit_pickle(place, packages)
        case InputKind.SAFETENSORS | InputKind.ARTEFACT:
            return Audit(kind.value, [], [], "loads")
        case InputKind.EXPORTED:
            return Audit("exported", *audit_exported(place))
        case _:
            raise refusal(kind, place)


def _audit_pickle(path: Path, trust: tuple[str, ...]) -> Audit:
    try:
        pickled = read(path)
    except UnsafeError as error:
        return Audit("pickle", [], [], str(error))
    names = sorted({name.full for name in pickled.tree.names})
    refused = [name.full for name in refused_names(pickled.tree.names, trust)]
    kind, verdict = "pickle", f"refused: {', '.join(refused)}"
    if not refused:
        kind, verdict = _verdict(pickled, trust, str(path))
    return Audit(kind, names, refused, verdict)


def _verdict(pickled: Pickled, trust: tuple[str, ...], where: str) -> tuple[str, str]:
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
        return kind, str(error)
    return kind, "loads"


def _empty(pickled: Pickled, node: TensorNode) -> Tensor:
    """The tensor's shape and dtype alone, checked like the tensor itself."""
    assert isinstance(node.source, View)
    check_view(node.source, pickled.storages.regions[node.source.storage].size, str(pickled.storages.file.path))
    return torch.empty(node.source.size, dtype=torch_dtype(node.source.dtype), device="meta")
