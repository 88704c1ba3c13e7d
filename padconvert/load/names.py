"""Which names of a tree may become classes and functions, and how a name is turned into one."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from padconvert.allow import FUNCTIONS, TYPES, WRAPPERS, class_allowed, hint, inside, may_be_trusted, unread
from padconvert.errors import FileError, UnsafeError, UsageError
from padconvert.load.nodes import NameNode
from padconvert.load.reductions import DATA_NAMES

_SHOWN = 6
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"


def check_trust(trust: Sequence[str]) -> tuple[str, ...]:
    """The packages as a tuple. Raises UsageError for a name that cannot be trusted as a package of models."""
    for package in trust:
        if not all(part.isidentifier() for part in package.split(".")):
            raise UsageError(f"--trust {package}: not a package's name. Name one as in 'import', like --trust mynets.")
        if not may_be_trusted(package):
            raise UsageError(f"--trust {package}: not a package of models. Name the package that holds the classes.")
    return tuple(trust)


def acceptable(name: NameNode, trust: tuple[str, ...]) -> bool:
    """Whether a name may stand in a pickle that is going to be rebuilt."""
    return name.full in DATA_NAMES or name.full in WRAPPERS or buildable(name, trust)


def buildable(name: NameNode, trust: tuple[str, ...]) -> bool:
    """Whether a name may become a class or function, and not only be read as data."""
    return name.full in FUNCTIONS or name.full in TYPES or class_allowed(name.module, name.name, trust)


def refused_names(names: Iterable[NameNode], trust: tuple[str, ...]) -> list[NameNode]:
    """The names, once each and in order, that may not stand in the file; what a checkpoint leaves unread may."""
    found = {name.full: name for name in names if not acceptable(name, trust) and not unread(name.module)}
    return list(found.values())


def check_names(names: Iterable[NameNode], trust: tuple[str, ...], where: str) -> None:
    """Raises UnsafeError that lists every refused name and the next step."""
    refused = refused_names(names, trust)
    if any(name.full == _COMPILED for name in refused):
        raise UnsafeError(
            f"{where}: a module that torch.compile wrapped, which brings the compiler along. "
            "Save the one below torch.compile: torch.save(model._orig_mod, path), and name that file."
        )
    if refused:
        listed = ", ".join(name.full for name in refused[:_SHOWN])
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise UnsafeError(f"{where}: asks for code that is not on the list: {listed}{more}; {_steps(refused)}.")


def _steps(refused: list[NameNode]) -> str:
    steps = dict.fromkeys(hint(name.module, name.name) for name in refused)
    return "; ".join(list(steps)[:3])


def join_working_directory() -> None:
    """Lets modules of the working directory be imported. Called only when the user asked for code by name.

    It comes last, so that no file that happens to lie there stands in for an installed package.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def resolve(name: NameNode, trust: tuple[str, ...], where: str) -> Any:
    """The class or function of this name, imported from its package.

    Raises UnsafeError where the name is not allowed or what is found there is another thing, FileError where the
    package or the name is not installed here.
    """
    if not buildable(name, trust):
        raise UnsafeError(f"{where}: {name.full} cannot be part of a model; {hint(name.module, name.name)}.")
    if inside(name.module, trust):
        join_working_directory()
    found = _found(name, where)
    if name.full not in FUNCTIONS and not _is_itself(found, name):
        raise UnsafeError(f"{where}: {name.full} is not a class or function of its own module. Save the model again.")
    return found


def _found(name: NameNode, where: str) -> Any:
    try:
        found: Any = importlib.import_module(name.module)
        for part in name.name.split("."):
            found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    except Exception as error:  # importing a package may raise anything
        raise FileError(
            f"{where}: {name.full} cannot be imported here ({error}). Install the version of "
            f"{name.module.split('.')[0]} that the model was saved with."
        ) from error
    return found.__func__ if isinstance(found, staticmethod) else found


def _is_itself(found: Any, name: NameNode) -> bool:
    """Whether a thing carries the module and name it was asked for by, so that no re-export slips through."""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return False
    return found.__module__ == name.module and found.__qualname__ == name.name
