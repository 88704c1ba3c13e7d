"""A user's saved model → a module and how to rebuild it. Nothing out of the file is executed.

One file per kind of input; `detect` tells them apart by content. A new kind is a new file and a case below.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from padconvert.allow import may_be_trusted
from padconvert.checkpoint.header import read_header
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checksum import sha256_of
from padconvert.errors import FileError, UnsafeError, UsageError
from padconvert.load.detect import InputKind as InputKind
from padconvert.load.detect import detect as detect
from padconvert.load.detect import refusal
from padconvert.load.directory import directory_bytes, load_directory
from padconvert.load.directory_build import rebuild_transformers
from padconvert.load.exported import load_exported
from padconvert.load.exported_lift import ExportedModule, build_exported
from padconvert.load.exported_program import unpacked
from padconvert.load.factory import architecture_of, build_factory, check_factory_trusted, put_tensors_, without_prefix
from padconvert.load.names import check_trust
from padconvert.load.pickled_file import Loaded, load_pickled, network_bytes
from padconvert.load.safetensors_file import load_safetensors
from padconvert.load.skeleton import module_from as module_from
from padconvert.load.skeleton import skeleton_of as skeleton_of
from padconvert.load.source import Source as Source
from padconvert.load.source import check_finite, own_tensors

_NO_ARCHITECTURE = "the file holds tensors but no architecture; name one with --arch"


def open_source(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    trust: Sequence[str] = (),
    state_key: str | None = None,
    hash: bool = True,
    intact: bool = True,
) -> Source:
    """Opens a saved model; see `Source`. `state_key` is the entry of a checkpoint to take, such as `ema`; `hash=False`
    leaves the checksum out, which would read the whole file; `intact=False` trusts that the records of a file that
    torch.save wrote are as they were written.

    Raises FileError (damaged, not a model, another architecture, NaN in a parameter), UnsafeError (names code that
    is not allowed), UsageError (`arch` or `trust` malformed, nothing under `state_key`).
    """
    place = Path(path)
    packages = check_trust(trust)
    architecture = architecture_of(arch, arch_args or {}) if arch else None
    if arch and not may_be_trusted(arch):
        raise UsageError(
            f"--arch {arch}: lies in no package of models (Python's own, torch, what padconvert is made of, the script "
            "that runs), and no artefact may name its network so. "
            "Write a function that calls it into a file of your own, and name that one: --arch mynets:make."
        )
    if arch_args and not arch:
        raise UsageError("--arch-arg needs --arch, the factory that takes it.")
    if place.is_dir() and detect(place) is InputKind.TRANSFORMERS:
        return _open_directory(place, packages, arch, state_key, hash, intact)
    kind, module, tensors, notes = _load(place, packages, state_key, intact)
    if module is not None and architecture is not None:
        raise UsageError(f"{place}: holds a whole model, so --arch has nothing to build. Leave --arch away.")
    if module is None and architecture is not None:
        module = build_factory(architecture)
        tensors, stripped = without_prefix(module, tensors)
        put_tensors_(module, tensors, str(place))
        notes += stripped
    extra: Mapping[str, Tensor] = {}
    if module is not None:
        check_finite(module, str(place))
        tensors = own_tensors(module)
        if architecture is None:
            architecture, extra = describe(module, packages)
    return Source(
        place,
        kind,
        module,
        tensors,
        architecture or {"kind": "none", "why": _NO_ARCHITECTURE},
        place.stat().st_size,
        sha256_of(place) if hash else None,
        notes,
        extra,
    )


def _open_directory(
    place: Path, trust: tuple[str, ...], arch: str | None, key: str | None, hash: bool, intact: bool
) -> Source:
    for option, value in (("--arch", arch), ("--state-key", key)):
        if value is not None:
            raise UsageError(f"{option} {value}: {place} is a transformers directory, whose config.json says what it "
                             f"holds. Leave {option} away.")  # fmt: skip
    loaded = load_directory(place, trust, intact)
    check_finite(loaded.module, str(place))
    return Source(
        place,
        "transformers",
        loaded.module,
        own_tensors(loaded.module),
        loaded.architecture,
        loaded.files.bytes,
        loaded.files.sha256() if hash else None,
        loaded.notes,
    )


def _load(path: Path, trust: tuple[str, ...], key: str | None, intact: bool) -> Loaded:
    kind = detect(path)
    if key is not None and kind is not InputKind.PICKLE:
        raise UsageError(f"--state-key {key}: {path} is no checkpoint of several entries. Leave it away.")
    match kind:
        case InputKind.PICKLE:
            return load_pickled(path, trust, key, intact)
        case InputKind.SAFETENSORS:
            tensors, notes = load_safetensors(path)
            return "safetensors", None, tensors, notes
        case InputKind.EXPORTED:
            return load_exported(path)
        case other:
            raise refusal(other, path)


def least_memory(path: Path, key: str | None = None) -> int:
    """Bytes of the tensors that whoever opens the file will hold, told before any is read; 0 where that is not known.

    Raises FileError, UnsafeError and UsageError as `open_source` does.
    """
    kind = detect(path)
    match kind:
        case InputKind.PICKLE:
            return network_bytes(path, key)
        case InputKind.SAFETENSORS | InputKind.ARTEFACT:
            header = read_checkpoint(path).header if path.is_dir() else read_header(path)
            return sum(slot.nbytes for slot in header.tensors.values())
        case InputKind.TRANSFORMERS:
            return directory_bytes(path)
        case _:
            return 0


def describe(module: nn.Module, trust: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The architecture of a module as a skeleton (of an exported program: its graph), and the tensors it needs beside
    the state dict; or why not."""
    if isinstance(module, ExportedModule):
        return module.architecture(), module.extra_tensors()
    try:
        skeleton, extra = skeleton_of(module, trust)
    except (UnsafeError, FileError) as error:
        return {"kind": "none", "why": str(error)}, {}
    return {"kind": "skeleton", "skeleton": skeleton}, extra


def rebuild(
    architecture: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    trust: Sequence[str] = (),
    missing_ok: Collection[str] = (),
) -> nn.Module:
    """The module that an artefact's manifest describes, with these tensors. Names in `missing_ok` may be absent;
    theirs stay on the meta device until the caller swaps the layers they belong to.

    Raises UnsafeError where it needs code that nobody trusts, FileError where the description is damaged or absent.
    """
    packages = check_trust(trust)
    match architecture.get("kind"):
        case "factory":
            check_factory_trusted(architecture, packages)
            args = architecture.get("args")
            checked = architecture_of(str(architecture.get("ref")), args if isinstance(args, dict) else {})
            module = build_factory(checked)
            put_tensors_(module, tensors, "the artefact", missing_ok)
            return module
        case "skeleton":
            return module_from(architecture.get("skeleton"), tensors, packages, missing_ok)
        case "graph":
            where = "the artefact's graph"
            return build_exported(unpacked(architecture, where), tensors, where, missing_ok)
        case "transformers":
            return rebuild_transformers(architecture, tensors, missing_ok)
        case "none":
            why = architecture.get("why")
            raise FileError(f"the artefact cannot rebuild its network ({why}). Load it with into=, a module of yours.")
        case other:
            raise FileError(f"the artefact describes its network as {other!r}, which this padconvert does not know.")
