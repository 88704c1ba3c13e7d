"""What `open_source` hands on: a saved model, loaded, and how to build its module again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.errors import FileError


@dataclass(frozen=True, slots=True)
class Source:
    """A saved model.

    `kind` is "module", "state_dict", "checkpoint", "safetensors", "exported" or "transformers". `module` is None where
    the file holds tensors and nobody named a factory. `tensors` holds every parameter and persistent buffer once, by
    its first name; `extra_tensors` what the architecture needs beside them. `architecture` is JSON: {"kind":
    "factory", "ref", "args"}, {"kind": "skeleton", …}, {"kind": "graph", …}, {"kind": "transformers", "class", "dtype",
    "config"} or {"kind": "none", "why"}. `sha256` is None where it was not asked for; a directory's is that of its
    config, index and weight files together, its `bytes` are those of the weight files.
    `notes` are lines a person wants to read: what was taken, stripped, left unread.
    """

    path: Path
    kind: str
    module: nn.Module | None
    tensors: Mapping[str, Tensor]
    architecture: dict[str, Any]
    bytes: int
    sha256: str | None
    notes: tuple[str, ...] = ()
    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers, each once, by the first of its names."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def check_finite(module: nn.Module, where: str) -> None:
    """Raises FileError naming the first parameter that holds NaN or infinity. Buffers may (masks of −inf do)."""
    for name, parameter in module.named_parameters():
        if not _finite(parameter.detach()):
            raise FileError(
                f"{where}: parameter '{name}' holds NaN or infinity, so the model is broken. "
                "Take a checkpoint from before its training diverged."
            )


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        return bool(tensor.isfinite().all())
    if tensor.dtype.itemsize == 1:
        return bool(tensor.float().isfinite().all())
    # both ends carry NaN along, and no copy is made
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
