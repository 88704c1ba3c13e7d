"""padconvert: turn a trained static PyTorch model into a partially dynamic one (PAD-Net, ACL 2023).

The public names are imported when they are first used, so that `import padconvert` itself costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from padconvert.api import export as export
    from padconvert.api import fold as fold
    from padconvert.api import plan as plan
    from padconvert.api import save as save
    from padconvert.convert import convert as convert
    from padconvert.errors import PadconvertError as PadconvertError
    from padconvert.fold import fold_ as fold_
    from padconvert.load.artefact import load as load
    from padconvert.options import ConvertOptions as ConvertOptions
    from padconvert.partition import Partitioner as Partitioner
    from padconvert.rewrite import rewrite_ as rewrite_

__all__ = [
    "ConvertOptions",
    "PadconvertError",
    "Partitioner",
    "convert",
    "export",
    "fold",
    "fold_",
    "load",
    "plan",
    "rewrite_",
    "save",
]

#: public name → the module it lives in
_HOMES = {
    "ConvertOptions": "padconvert.options",
    "PadconvertError": "padconvert.errors",
    "Partitioner": "padconvert.partition",
    "convert": "padconvert.convert",
    "export": "padconvert.api",
    "fold": "padconvert.api",
    "fold_": "padconvert.fold",
    "load": "padconvert.load.artefact",
    "plan": "padconvert.api",
    "rewrite_": "padconvert.rewrite",
    "save": "padconvert.api",
}


class _Package(ModuleType):
    """Python binds a submodule to its parent when it is imported, and `padconvert.load` is a function as well as a
    folder. Here the public name wins; `from padconvert.load import …` finds the folder all the same."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        if name == "__version__":
            return import_module("importlib.metadata").version("padconvert")
        if name not in _HOMES:
            raise AttributeError(f"module 'padconvert' has no attribute {name!r}")
        value: object = getattr(import_module(_HOMES[name]), name)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
