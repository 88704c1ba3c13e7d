"""A checkpoint that is a folder: which files hold its tensors, and where its manifest stands. No tensor is read here.

    OUT/config.json                         of a transformers directory; the manifest is its `quantization_config`
    OUT/model.safetensors                   or else, in shards:
    OUT/model-00001-of-00002.safetensors …  with OUT/model.safetensors.index.json

Without a config.json that carries it, the manifest stands in the index's `metadata`, or in the one file's header.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padconvert.checkpoint.header import MAX_HEADER, Header, Slot, open_regular, parse_json, quote, read_metadata
from padconvert.checkpoint.layout import Spec, expected_tensors, placeholders
from padconvert.checkpoint.manifest import CRC_KEY, KEY, Manifest, manifest_to_json, sealed
from padconvert.errors import FileError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: `quant_method` of our `quantization_config`
METHOD = "padconvert"


@dataclass(frozen=True, slots=True)
class FolderPlan:
    """What a folder says of itself. `files` hold the tensors; `weight_map` (of a sharded one) says which is where;
    `metadata` is the manifest's text and checksum as a single file's header would have them; `config` is config.json
    without the manifest."""

    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None


def examine_folder(folder: Path) -> FolderPlan:
    """Reads config.json and the index of a folder. Raises FileError where a file is damaged or missing, or where the
    index names one that is not plainly inside the folder."""
    config = read_object(folder / CONFIG) if (folder / CONFIG).exists() else {}
    weight_map, of_index = _read_index(folder)
    files = (SINGLE,) if weight_map is None else tuple(sorted(set(weight_map.values())))
    for name in files:
        if not (folder / name).is_file():
            raise FileError(f"{folder}: {name} is missing{_why(weight_map)}. Copy the whole folder again.")
    if (mine := own_part(config)) is not None:
        rest = {key: value for key, value in config.items() if key != "quantization_config"}
        return FolderPlan(files, weight_map, metadata_in(mine), rest)
    metadata = read_metadata(folder / SINGLE) if weight_map is None else of_index
    return FolderPlan(files, weight_map, metadata, None)


def _why(weight_map: Mapping[str, str] | None) -> str:
    return " (there is no index of several files either)" if weight_map is None else f", which {INDEX} names"


def carries_manifest(folder: Path) -> bool:
    """Whether the folder is an artefact of padconvert, damaged perhaps."""
    try:
        if (folder / CONFIG).is_file() and own_part(read_object(folder / CONFIG)) is not None:
            return True
        if (folder / INDEX).is_file():
            return KEY in _texts(read_object(folder / INDEX).get("metadata"))
        return (folder / SINGLE).is_file() and KEY in read_metadata(folder / SINGLE)
    except FileError:
        return False


def own_part(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json, if it is padconvert's."""
    part = config.get("quantization_config")
    return part if isinstance(part, dict) and part.get("quant_method") == METHOD else None


def read_object(path: Path, limit: int = MAX_HEADER) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises FileError."""
    with open_regular(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise FileError(f"{path}: is larger than {limit >> 20} MiB, so no file of a transformers directory.")
    try:
        document = parse_json(text, "it")
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise FileError(f"{path}: holds no JSON object.")
    return document


def _texts(value: object) -> dict[str, str]:
    entries = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in entries if isinstance(text, str)}


def _read_index(folder: Path) -> tuple[dict[str, str] | None, dict[str, str]]:
    """(weight_map, metadata) of the index; (None, {}) where there is none."""
    path = folder / INDEX
    if not path.exists():
        return None, {}
    if (folder / SINGLE).exists():
        raise FileError(f"{folder}: holds both {SINGLE} and {INDEX}; take away the one that is out of date.")
    document = read_object(path)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{path}: has no 'weight_map'.")
    for file in weight_map.values():
        check_plain_name(file, path)
    return weight_map, _texts(document.get("metadata"))


def check_plain_name(name: object, path: Path) -> None:
    """Raises FileError unless `name` is a safetensors file's own name, without any folder."""
    plain = isinstance(name, str) and re.fullmatch(r"[\w][\w.+-]*\.safetensors", name, re.ASCII)
    if not plain:
        raise FileError(f"{path}: names {quote(str(name))}, which is no plain name of a file beside it.")


# ---- the manifest in config.json


def config_with(config: Mapping[str, Any], manifest: Manifest, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """config.json of a transformers directory: `config`, and the manifest as its `quantization_config`.

    The manifest's architecture leaves its own `config` out, for that is the rest of the file.
    """
    bare = {key: value for key, value in manifest.architecture.items() if key != "config"}
    text = manifest_to_json(dataclasses.replace(manifest, architecture=bare))
    part = {"quant_method": METHOD, CRC_KEY: sealed(text, specs)[CRC_KEY], **json.loads(text)}
    return {**config, "quantization_config": part}


def metadata_in(part: Mapping[str, Any]) -> dict[str, str]:
    """The manifest's text, as `config_with` had it, and its checksum."""
    document = {key: value for key, value in part.items() if key not in ("quant_method", CRC_KEY)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {KEY: text, CRC_KEY: str(part.get(CRC_KEY))}


# ---- shards


def plan_shards(
    specs: Mapping[str, Spec], sizes: Mapping[str, int], manifest: Manifest, limit: int | None
) -> dict[str, list[str]]:
    """File → its tensors' names. All tensors of a converted layer, or of one feed-forward block, go into one file.

    A file takes what fits into `limit` bytes, in natural order of names, but at least one layer; None is no limit.
    """
    shards: list[list[str]] = []
    room = 0
    for names in _together(specs, manifest):
        size = sum(sizes[name] for name in names)
        if not shards or (limit is not None and size > room):
            shards.append([])
            room = limit or 0
        shards[-1] += names
        room -= size
    if len(shards) <= 1:
        return {SINGLE: [name for names in shards for name in names]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def _together(specs: Mapping[str, Spec], manifest: Manifest) -> list[list[str]]:
    unit_of = {
        name: entry.facts.group or entry.name
        for entry in manifest.layers
        for name in (*expected_tensors(entry), *placeholders([entry]))
    }
    units: dict[str, list[str]] = {}
    for name in sorted(specs, key=_natural):
        units.setdefault(unit_of.get(name, name), []).append(name)
    return list(units.values())


def _natural(name: str) -> list[tuple[int, str]]:
    """layer.2 before layer.10."""
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in re.split(r"(\d+)", name)]


def index_text(shards: Mapping[str, Iterable[str]], sizes: Mapping[str, int], metadata: Mapping[str, str]) -> str:
    """The index as transformers writes it, with `metadata` beside the size."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    document = {"metadata": {"total_size": sum(sizes.values()), **metadata}, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def merged(headers: Mapping[str, Header], weight_map: Mapping[str, str] | None, metadata: Mapping[str, str]) -> Header:
    """The header of one file that would hold what these hold, one after the other. Raises FileError where a tensor is
    not in the file that the index names, or in two."""
    tensors: dict[str, Slot] = {}
    begin = 0
    for file, header in headers.items():
        for name, slot in header.tensors.items():
            if name in tensors or (weight_map is not None and weight_map.get(name) != file):
                raise FileError(f"{file} holds tensor {quote(name)}, which the index does not place there.")
            tensors[name] = dataclasses.replace(slot, begin=begin + slot.begin, end=begin + slot.end)
        begin += header.file_size - header.data_start
    if missing := sorted((weight_map or {}).keys() - tensors.keys()):
        raise FileError(f"tensor {quote(missing[0])} is missing in {(weight_map or {})[missing[0]]}.")
    return Header(dict(metadata), tensors, sum(header.data_start for header in headers.values()))


def count(specs: Mapping[str, Spec]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(math.prod(shape) for _, shape in specs.values())
