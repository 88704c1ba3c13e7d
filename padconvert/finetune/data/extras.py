"""The optional packages that some readers need."""

from __future__ import annotations

import importlib
from types import ModuleType

from padconvert.errors import FileError


def needed(module: str, for_what: str, extra: str = "data") -> ModuleType:
    """The module, imported. Raises `FileError` naming the extra to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FileError(f"{for_what}: reading it needs '{module}'. Install padconvert[{extra}]") from error
