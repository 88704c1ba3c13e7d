"""A transformers directory → its module. Our own readers read the files; transformers gets tensors and no path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.checkpoint.header import quote, read_header
from padconvert.checkpoint.read import open_tensors
from padconvert.errors import FileError
from padconvert.export.directory import other_files
from padconvert.load.directory_build import DTYPES, architecture_record, load_pretrained
from padconvert.load.directory_class import class_named, plain_config, transformers_package
from padconvert.load.directory_files import Directory, read_directory
from padconvert.load.pickled_file import load_pickled, network_bytes
from padconvert.load.state_dict import tensor_names

#: a tokenizer and its tables are a few ten megabytes
_MOST_BESIDE = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedDirectory:
    """`module` is in eval mode, its tensors on the files' pages; `architecture` is what `rebuild` takes."""

    files: Directory
    module: nn.Module
    architecture: dict[str, Any]
    notes: tuple[str, ...]


def load_directory(folder: Path, trust: tuple[str, ...] = (), intact: bool = True) -> LoadedDirectory:
    """The model of a directory as transformers' own from_pretrained gives it, in the dtype of its files.

    Nothing that came with it is run. `trust` widens what may stand in a pickled file, as for any pickled
    file; `intact` is that of `load_pickled`.
    Raises FileError (damaged, incomplete, unknown to transformers, too much beside the weights), UnsafeError (a name
    that leads out of the folder, a pickle that asks for code, a class that is code of the model's own).
    """
    where = str(folder)
    transformers_package(where)
    files = read_directory(folder)
    _check_beside(folder)
    cls = class_named(files.config, where)
    config = plain_config(files.config, where)
    tensors, read = _tensors(files, trust, intact)
    dtype, mixed = _dtype(tensors, files.config, where)
    module, built = load_pretrained(cls, config, tensors, dtype, where)
    notes = (*_notes_on(files), *read, *mixed, *built)
    return LoadedDirectory(files, module, architecture_record(cls, config, dtype), notes)


def _check_beside(folder: Path) -> None:
    """What lies beside the weights is copied into a converted directory. Raises as `other_files` does, and FileError
    where it is more than belongs to a model."""
    sizes = {path: path.stat().st_size for path, _ in other_files(folder)}
    if sum(sizes.values()) > _MOST_BESIDE:
        largest = max(sizes, key=lambda path: sizes[path])
        raise FileError(
            f"{folder}: {sum(sizes.values()):,} bytes lie beside its weights ({largest.relative_to(folder)} is the "
            f"largest, {sizes[largest]:,}), and would be copied; at most {_MOST_BESIDE:,} are. "
            "Take out what is not part of the model."
        )


def directory_bytes(folder: Path) -> int:
    """Bytes of the tensors in the directory's weight files; none is read. Raises as `load_directory` does."""
    return sum(
        network_bytes(path)
        if path.suffix == ".bin"
        else sum(slot.nbytes for slot in read_header(path).tensors.values())
        for path in read_directory(folder).shards
    )


def _notes_on(files: Directory) -> tuple[str, ...]:
    code = files.code
    return (f"code that came with the model was not run: {', '.join(code)}",) if code else ()


def _tensors(files: Directory, trust: tuple[str, ...], intact: bool) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """All tensors by their names in the files, wrappers' prefixes stripped, and notes."""
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for path, listed in files.shards.items():
        held, said = _of_pickle(path, trust, intact) if path.suffix == ".bin" else (_of_safetensors(path), ())
        notes.extend(said)
        absent = sorted((listed or frozenset()) - held.keys())
        if absent:
            raise FileError(
                f"{path}: does not hold {quote(absent[0])}, though {files.index} says that it does "
                f"({len(absent)} such). Download the directory again."
            )
        extra = sorted(held.keys() - listed) if listed is not None else []
        if extra:
            notes.append(f"left unread, as the index does not list them: {', '.join(extra[:4])}")
        tensors |= {name: tensor for name, tensor in held.items() if listed is None or name in listed}
    names, stripped = tensor_names(list(tensors), str(files.folder))
    return {name: tensors[stored] for name, stored in names.items()}, tuple(dict.fromkeys((*notes, *stripped)))


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    file = open_tensors(path)
    try:
        return {name: file.tensor(name) for name in file.header.tensors}
    except FileError as error:
        raise FileError(f"{path}: {error}") from None


def _of_pickle(path: Path, trust: tuple[str, ...], intact: bool) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    kind, module, tensors, notes = load_pickled(path, trust, intact=intact)
    if module is not None or kind != "state_dict":
        raise FileError(
            f"{path}: holds a {kind}, where a transformers directory has a state dict. Name that file itself, "
            "or save the model with model.save_pretrained."
        )
    return tensors, notes


def _dtype(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype that the network gets: that of the files. Of several the one that the config states, else the widest;
    and a note."""
    counts = Counter(tensor.dtype for tensor in tensors.values())
    found = [dtype for dtype in counts if dtype.is_floating_point or dtype.is_complex]
    strange = [dtype for dtype in found if dtype not in DTYPES]
    if strange or not found:
        what = f"{_name(strange[0])} tensors" if strange else "no floating-point tensors"
        raise FileError(f"{where}: holds {what}, and no network in plain precision. Save it in float32 or bfloat16.")
    if len(found) == 1:
        return found[0], ()
    stated = config.get("dtype") or config.get("torch_dtype")
    taken = next((dtype for dtype in found if _name(dtype) == stated), min(found, key=DTYPES.index))
    held = ", ".join(f"{counts[dtype]} in {_name(dtype)}" for dtype in sorted(found, key=DTYPES.index))
    return taken, (f"its tensors are of several dtypes ({held}); all are loaded in {_name(taken)}",)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
