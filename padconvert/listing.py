"""What a file of tensors holds, out of its header alone: no tensor is read, and torch is not needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from padconvert.checkpoint.header import header_of, open_regular
from padconvert.results import Holdings, Inspection, LayerResult
from padconvert.words import Kind, Reason, Verdict

#: under this key a header's metadata has an artefact's manifest
_MANIFEST = "padconvert"

#: name → (shape, bytes per number)
Sizes = Mapping[str, tuple[tuple[int, ...], int]]

#: by the rank of a weight: what a tensor without its architecture most likely is
RANKS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def list_tensors(path: Path) -> Inspection | None:
    """The tensors of a safetensors file that is no artefact; None for anything else. Raises FileError where it is
    damaged, or is not there."""
    if path.is_dir():
        return None
    with open_regular(path) as file:
        start = file.read(9)
        if start[8:] != b"{":
            return None
        file.seek(0)
        header = header_of(file, path)
    if _MANIFEST in header.metadata:
        return None
    sizes = {name: (slot.shape, slot.nbytes // max(math.prod(slot.shape), 1)) for name, slot in header.tensors.items()}
    dtypes = {name: slot.dtype for name, slot in header.tensors.items()}
    return of_tensors(path, "safetensors", header.file_size, sizes, dtypes)


def of_tensors(
    path: Path, kind: str, size: int, sizes: Sizes, dtypes: Mapping[str, str], notes: tuple[str, ...] = ()
) -> Inspection:
    """Every weight that looks like a layer's, as kind `unknown`: only the architecture tells what it is."""
    layers = tuple(_unknown(name, shape, dtypes[name]) for name, (shape, _) in sizes.items() if _is_weight(name, shape))
    told = "name the architecture with --arch PKG.MOD:FACTORY to see what can be converted"
    return Inspection(str(path), kind, size, unconverted(layers, sizes, size), layers, (*notes, told))


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    return name.rpartition(".")[2] == "weight" and len(shape) in RANKS


def _unknown(name: str, shape: tuple[int, ...], dtype: str) -> LayerResult:
    return LayerResult(
        name=name.rpartition(".")[0],
        aliases=(),
        kind=Kind.UNKNOWN.value,
        verdict=Verdict.INELIGIBLE,
        reason=Reason.NO_ARCHITECTURE,
        detail=f"a {RANKS[len(shape)]}, going by its shape",
        dtype=dtype,
        weight_shape=shape,
    )


def unconverted(layers: tuple[LayerResult, ...], sizes: Sizes, source_bytes: int) -> Holdings:
    """Totals of a source of which nothing would be converted."""
    numbers = sum(math.prod(shape) for shape, _ in sizes.values())
    size = sum(math.prod(shape) * itemsize for shape, itemsize in sizes.values())
    return Holdings(len(layers), 0, numbers, None, None, source_bytes, None, None, tensor_bytes_source=size)
