"""`inspect --audit`: what is in a file, and whether it may be loaded, for a person or a gate in front of a model store.

Nothing is loaded, nothing outside the file is asked. The verdict is that of loading itself, from the same code.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from padconvert.allow import FUNCTIONS, TYPES, WRAPPERS, class_allowed, hint, inside, may_be_trusted, unread
from padconvert.checkpoint.header import open_regular, read_header
from padconvert.errors import FileError, UnsafeError
from padconvert.load.archive import open_zip
from padconvert.load.audit import Audit, audit
from padconvert.load.names import check_trust
from padconvert.load.reductions import DATA_NAMES
from padconvert.results import Audited, AuditedName, Member


def examine(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> Audited:
    """The verdict on any file or folder; see `Audited`. Raises UsageError for a package that cannot be trusted."""
    place, packages = Path(path), check_trust(trust)
    size, members = _members(place)
    try:
        found = audit(place, packages)
    except UnsafeError as error:
        return Audited(str(place), "unknown", size, "refused", str(error), members=members)
    except FileError as error:
        return Audited(str(place), "unknown", size, "unreadable", str(error), members=members)
    names = tuple(_name(name, found, packages) for name in found.names)
    verdict, wanted = _verdict(found)
    detail = "" if verdict == "safe" else found.verdict
    return Audited(str(place), found.kind, size, verdict, detail, wanted, names, members)


def _verdict(found: Audit) -> tuple[str, tuple[str, ...]]:
    """The verdict, and the packages that would have to be trusted where that is all that is missing."""
    if found.verdict == "loads":
        return "safe", ()
    if not found.unsafe:
        return "unreadable", ()
    packages = tuple(sorted({name.split(".")[0] for name in found.refused}))
    if packages and all(_liftable(name) for name in found.refused):
        return "trust", packages
    return "refused", ()


def _liftable(name: str) -> bool:
    """Whether --trust of its package would allow the name."""
    module, _, last = name.rpartition(".")
    return may_be_trusted(module) and class_allowed(module, last, (module.split(".")[0],))


def _name(name: str, found: Audit, trust: tuple[str, ...]) -> AuditedName:
    module, _, last = name.rpartition(".")
    if found.kind == "exported":
        return AuditedName(name, name not in found.refused, "not on the list" if name in found.refused else "listed")
    if name in found.refused:
        return AuditedName(name, False, hint(module, last))
    if found.kind == "transformers" and last == "py":
        return AuditedName(name, True, "code that came with the model; it is never run")
    return AuditedName(name, True, _why(name, module, last, trust))


def _why(name: str, module: str, last: str, trust: tuple[str, ...]) -> str:
    if name in DATA_NAMES:
        return "read as data"
    if name in FUNCTIONS or name in TYPES:
        return "a listed function or type"
    if name in WRAPPERS:
        return "a wrapper; the network inside is taken"
    if inside(module, trust):
        return "of a package you trust"
    if class_allowed(module, last):
        return "a class of a listed package" if "." not in last and last[:1].isupper() else "of a listed package"
    assert unread(module), name
    return "left unread"


def _members(path: Path) -> tuple[int, tuple[Member, ...]]:
    """(bytes in all, what the file or folder is made of), as far as that can be told."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            members = tuple(Member(file.name, file.stat().st_size) for file in files)
            return sum(member.bytes for member in members), members
        with open_regular(path):  # a pipe or a device is never read from, nor waited for
            size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with open_zip(path) as archive:
                return size, tuple(Member(info.filename, info.file_size) for info in archive.infolist())
        return size, tuple(Member(name, slot.nbytes) for name, slot in read_header(path).tensors.items())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return (path.stat().st_size if path.is_file() else 0), ()
    except FileError:  # no safetensors file, a damaged one or no regular file: the verdict says so
        return (path.stat().st_size if path.is_file() else 0), ()
