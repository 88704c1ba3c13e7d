"""A program that torch.export.save wrote (`.pt2`) → a module, without torch's loader and without the user's code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from padconvert.errors import FileError, UnsafeError
from padconvert.load.exported_archive import EXPORT, member_names, read_archive, why_refused
from padconvert.load.exported_grammar import check_expression
from padconvert.load.exported_inputs import fixed_batch
from padconvert.load.exported_lift import ExportedModule, build_exported
from padconvert.load.exported_ops import DROPPED, is_allowed
from padconvert.load.exported_program import Json
from padconvert.load.exported_torch import BLOCKS, document_of, expressions_of

Loaded = tuple[str, nn.Module | None, Mapping[str, Tensor], tuple[str, ...]]

#: operations that compute something else in training; the place of the argument that says so
_MODES = {
    "aten.dropout.default": 2,
    "aten.alpha_dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.feature_alpha_dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.rrelu.default": 3,
    "aten.batch_norm.default": 5,
    "aten.instance_norm.default": 5,
}
_NORMALISES_BY_INPUT = {"aten.instance_norm.default"}


def load_exported(path: Path) -> Loaded:
    """("exported", the module, no tensors beside it, notes).

    Raises UnsafeError for an archive that would run code in torch's loader, FileError for a damaged or older one, and
    for a program that was exported in training mode.
    """
    archive = read_archive(path)
    document = document_of(archive.program, str(path))
    module = build_exported(document, archive.tensors, str(path))
    check_mode(document, str(path))
    return "exported", module, {}, notes_of(document, module)


def audit_exported(path: Path) -> tuple[list[str], list[str], str]:
    """(every member, operation and size in the file; those that are refused; "loads", or why it does not load).

    Reads as loading does, as far as loading gets. Raises FileError where not even the archive's directory can be read.
    """
    members = member_names(path)
    names = [f"member {name}" for name in members]
    refused = [f"member {name}" for name in members if why_refused(name.partition("/")[2])]
    try:
        archive = read_archive(path)
    except (UnsafeError, FileError) as error:
        return names, refused, str(error)
    operations = sorted({f"operation {name}" for name in _operations_of(archive.program)})
    sizes = sorted({f"size {size}" for size in expressions_of(archive.program)})
    refused += [name for name in operations if not _is_listed(name.removeprefix("operation "))]
    refused += [name for name in sizes if not _is_size(name.removeprefix("size "))]
    try:
        document = document_of(archive.program, str(path))
        build_exported(document, archive.tensors, str(path))
        check_mode(document, str(path))
        verdict = "loads"
    except (UnsafeError, FileError) as error:
        verdict = str(error)
    return names + operations + sizes, refused, verdict


def _operations_of(program: object) -> Iterator[str]:
    """The name of every operation in torch's JSON, also of those inside blocks."""
    stack = [program]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            if "target" in found and "inputs" in found:
                yield str(found["target"])
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def _is_listed(target: str) -> bool:
    """Whether an operation of torch's JSON may be part of a program."""
    op = target.removeprefix("torch.ops.")
    return target in BLOCKS or op in DROPPED or is_allowed(op)


def _is_size(text: str) -> bool:
    try:
        return bool(check_expression(text, ""))
    except UnsafeError:
        return False


def check_mode(document: Json, where: str) -> None:
    """Raises FileError where dropout or normalisation would train: the mode cannot be changed after an export."""
    for node in document["nodes"]:
        place = _MODES.get(node["op"])
        if place is None or node["op"] in _NORMALISES_BY_INPUT:
            continue
        mode = node["args"][place] if len(node["args"]) > place else node["kwargs"].get("train", False)
        if mode is True:
            raise FileError(
                f"{where}: exported in training mode ({node['op']}). Export it after model.eval(): {EXPORT}."
            )


def notes_of(document: Json, module: ExportedModule) -> tuple[str, ...]:
    """What a person wants to know of a program that became a module."""
    notes = ["an exported program: dropout and normalisation stay as exported, in eval mode"]
    batch = fixed_batch(document)
    if batch is not None:
        notes.append(f"exported for a batch of {batch} alone: it may refuse others. Export it with dynamic_shapes")
    left = sum(node.op == "call_function" and _is_layer(node.target) for node in module.graph.nodes)
    if left:
        why = "transposed, or their weight is computed or shared"
        notes.append(f"{left} convolution or linear calls stay in the graph: {why}")
    return tuple(notes)


def _is_layer(target: object) -> bool:
    return str(target).startswith(("aten.conv", "aten.linear.", "aten.addmm."))
