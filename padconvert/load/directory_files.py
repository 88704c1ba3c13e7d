"""What a transformers directory is made of: its config, its weight files and their index, nothing outside of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padconvert.checkpoint.folder import read_object
from padconvert.checkpoint.header import open_regular, quote
from padconvert.checksum import sha256_of_all
from padconvert.errors import FileError, UnsafeError

CONFIG = "config.json"
_MAX_CONFIG = 16 << 20
_MAX_INDEX = 256 << 20
_MAX_DEPTH = 32
#: single files and indexes, in the order in which transformers looks for them
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ELSEWHERE = {
    "adapter_config.json": "an adapter without its model; merge it into the model and save that",
    "tf_model.h5": "weights of TensorFlow; load it with from_pretrained(…, from_tf=True) and save_pretrained",
    "flax_model.msgpack": "weights of Flax; load it with from_pretrained(…, from_flax=True) and save_pretrained",
}


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory whose config and index were read, and of whose weight files each is there.

    `shards` maps each weight file to the tensors that the index says are in it; None where there is no index.
    """

    folder: Path
    config: dict[str, Any]
    index: Path | None
    shards: Mapping[Path, frozenset[str] | None]

    @property
    def bytes(self) -> int:
        """The size of the weight files."""
        return sum(path.stat().st_size for path in self.shards)

    @property
    def code(self) -> tuple[str, ...]:
        """The names of Python files that came with the model, and are never run."""
        return tuple(sorted(path.name for path in self.folder.glob("*.py")))

    def sha256(self) -> str:
        """One checksum for the config, the index and the weight files; see `sha256_of_all`."""
        return sha256_of_all([self.folder / CONFIG, *([self.index] if self.index else []), *self.shards])


def read_directory(folder: Path) -> Directory:
    """The directory's parts. Only the config and the index are read.

    Raises FileError (not JSON, quantised, no weights, a shard missing), UnsafeError (a name that leads out of it).
    """
    config = read_config(folder)
    check_not_quantized(config, str(folder))
    for name in _WEIGHTS:
        if (folder / name).is_symlink() or (folder / name).exists():
            path = file_inside(folder, name)
            if name.endswith(".json"):
                return Directory(folder, config, path, _read_index(folder, path))
            _check_present(path)
            return Directory(folder, config, None, {path: None})
    raise _elsewhere(folder) or FileError(
        f"{folder}: holds no weights, neither {_WEIGHTS[0]} nor {_WEIGHTS[2]} nor an index of either. "
        "Download the directory again, or save it with model.save_pretrained."
    )


def not_a_directory(folder: Path) -> FileError:
    """The error for a folder without a config."""
    return _elsewhere(folder) or FileError(
        f"{folder}: a folder without {CONFIG}, so not a transformers model. Name the model's file."
    )


def _elsewhere(folder: Path) -> FileError | None:
    found = next((what for name, what in _ELSEWHERE.items() if (folder / name).exists()), None)
    return FileError(f"{folder}: holds {found}.") if found else None


def read_config(folder: Path) -> dict[str, Any]:
    """The directory's config.json as a dict of plain values. Raises FileError, UnsafeError where it lies elsewhere."""
    path = file_inside(folder, CONFIG)
    config = read_object(path, _MAX_CONFIG)
    check_depth(config, str(path))
    return config


def check_not_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raises FileError where a part of the config says that the weights are stored in a quantised form."""
    for table in tables(config):
        for key in ("quantization_config", "compression_config"):
            stated = table.get(key)
            if stated is not None:
                method = stated.get("quant_method") if isinstance(stated, dict) else stated
                raise FileError(
                    f"{where}: its weights are quantised ({quote(str(method))}), and only plain ones can be converted. "
                    "Name the directory it was quantised from, or dequantise it and save that."
                )


def check_depth(value: object, where: str, depth: int = _MAX_DEPTH) -> None:
    """Raises FileError for JSON that is nested deeper than any config is."""
    if isinstance(value, dict | list):
        if depth == 0:
            raise FileError(f"{where}: nested more than {_MAX_DEPTH} deep, so no model's config.")
        for inner in value.values() if isinstance(value, dict) else value:
            check_depth(inner, where, depth - 1)


def tables(value: object) -> Iterator[Mapping[str, Any]]:
    """Every dict in JSON, outermost first."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tables(inner)


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. A link may lead elsewhere within it, or from a snapshot of the hub's cache to
    the cache's blobs. Raises UnsafeError where it leads out, FileError where it leads nowhere."""
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve()
    except RuntimeError:  # what pathlib of Python 3.11 and 3.12 says of a loop; later ones leave it to `open`
        raise FileError(f"{path}: is a link that leads back to itself. Put the file itself in its place.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read ({error}).") from None
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not in_cache:
        raise UnsafeError(
            f"{path}: is a link that leads out of the directory, to {real}. Put the file itself into the directory."
        )
    return path


def _read_index(folder: Path, path: Path) -> dict[Path, frozenset[str]]:
    """Each shard with the names of its tensors, in the order of the shards' names."""
    weight_map = read_object(path, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{path}: has no 'weight_map' from tensors to files. Download the directory again.")
    tensors: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        _check_plain(path, shard)
        tensors.setdefault(shard, set()).add(tensor)
    shards = {file_inside(folder, shard): frozenset(names) for shard, names in sorted(tensors.items())}
    for shard in shards:
        _check_present(shard)
    return shards


def _check_plain(index: Path, name: object) -> None:
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("/\\:") or name.startswith("."):
        said = quote(name if isinstance(name, str) else json.dumps(name))
        raise UnsafeError(f"{index}: names a file {said} for a shard, which is no plain name of a file beside it.")
    if not name.endswith(f".{suffix}"):
        raise FileError(f"{index}: names a file {quote(name)} for a shard, which does not end on .{suffix}.")


def _check_present(path: Path) -> None:
    if not path.exists():
        raise FileError(f"{path}: is missing, though the directory's model needs it. Download the directory again.")
    open_regular(path).close()
