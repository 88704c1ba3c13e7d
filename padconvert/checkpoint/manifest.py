"""The manifest: what a checkpoint says of itself, as compact sorted JSON under the metadata key `padconvert`.

It holds all that is needed to read and check the file's tensors and to rebuild the model. It knows no tensor.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from padconvert.checkpoint.header import parse_json, quote
from padconvert.errors import FileError
from padconvert.layers.facts import LayerFacts

FORMAT = 1
#: the metadata key under which the manifest stands
KEY = "padconvert"
#: and its checksum, which covers the tensors' names, dtypes and shapes too
CRC_KEY = "padconvert_crc32"

Specs = Mapping[str, tuple[str, tuple[int, ...]]]

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """A converted layer: its first name in module order, its further names, and its facts.

    `equal_experts`: all experts still are the trained weight; one is stored and expanded on load.
    """

    __pydantic_config__ = _STRICT

    name: str
    aliases: tuple[str, ...]
    equal_experts: bool
    facts: LayerFacts

    @property
    def stored_experts(self) -> int:
        return 1 if self.equal_experts else self.facts.num_experts


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an artefact comes from; equal provenance is the condition for equal bytes.

    `versions` names at least torch, padconvert and python. `source_sha256` is None for a model never saved.
    """

    __pydantic_config__ = _STRICT

    source_sha256: str | None
    source_kind: str
    versions: dict[str, str]
    device: str
    threads: Size
    seed: int
    route: Literal["trained", "data-free"]


@dataclass(frozen=True, slots=True)
class ProbeInput:
    """One input of the model: its name (None: positional), its shape without the batch, its dtype, and for integers
    the exclusive upper and the lower bound of its values."""

    __pydantic_config__ = _STRICT

    name: str | None
    shape: tuple[Count, ...]
    dtype: str
    high: int | None
    low: int = 0


@dataclass(frozen=True, slots=True)
class ProbeOutput:
    """One output: its shape and dtype, max|y| over all finite entries, and every `stride`-th entry as base64 of
    little-endian float64 (for float64 outputs) or float32 (for all others, exactly)."""

    __pydantic_config__ = _STRICT

    shape: tuple[Count, ...]
    dtype: str
    max_abs: float
    stride: Size
    values: str


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """The model's outputs in eval mode on inputs that `seed` gives back, so that `verify` can hold the file against
    the model it came from."""

    __pydantic_config__ = _STRICT

    seed: int
    inputs: tuple[ProbeInput, ...]
    outputs: tuple[ProbeOutput, ...]
    batch: Size = 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it. `crc32` and further `aliases` are filled in by `write_checkpoint`.

    `padconvert` is the version that wrote the file; `architecture` says how to rebuild the model, `policy` what was
    asked for; `aliases` maps the further names of a tied tensor to the one it is stored under; `extra_tensors` are
    stored tensors that are not in the model's state dict (non-persistent buffers, plain tensor attributes).
    """

    __pydantic_config__ = _STRICT

    padconvert: str
    layers: tuple[LayerEntry, ...]
    architecture: dict[str, Any]
    policy: dict[str, Any]
    provenance: Provenance
    trained: bool
    probe: ProbeRecord | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    extra_tensors: tuple[str, ...] = ()
    crc32: dict[str, Crc32] = field(default_factory=dict)
    format: Literal[1] = 1


def manifest_to_json(manifest: Manifest) -> str:
    """Compact, with sorted keys: equal manifests give equal text."""
    document = dataclasses.asdict(manifest)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def metadata_of(manifest: Manifest, specs: Specs) -> dict[str, str]:
    """What stands in the header's metadata of a file with tensors of these (dtype, shape)."""
    return sealed(manifest_to_json(manifest), specs)


def sealed(text: str, specs: Specs) -> dict[str, str]:
    """The metadata of a manifest's text."""
    return {"format": "pt", KEY: text, CRC_KEY: _checksum(text, specs)}


def check_seal(metadata: Mapping[str, str], specs: Specs) -> None:
    """Raises FileError where a bit of the manifest, or of what the header says of the tensors, is not as written."""
    if metadata.get(CRC_KEY) != _checksum(metadata[KEY], specs):
        raise FileError("the header is damaged: its checksum does not fit. Copy the file again, or make it again.")


def _checksum(text: str, specs: Specs) -> str:
    shapes = json.dumps(sorted((name, *spec) for name, spec in specs.items()))
    return f"{zlib.crc32((text + shapes).encode('utf-8', 'surrogatepass')):08x}"


def manifest_from_json(text: str) -> Manifest:
    """The manifest in `text`. Raises FileError where it is newer than this code, or not a manifest."""
    document = parse_json(text, "the padconvert manifest")
    if not isinstance(document, dict):
        raise FileError("the padconvert manifest is no JSON object.")
    version = document.get("format")
    if type(version) is not int or version < 1:
        raise FileError(f"the padconvert manifest names no format: {quote(str(version))}.")
    if version > FORMAT:
        raise FileError(f"checkpoint format {version}; a newer padconvert is needed, this one reads format {FORMAT}.")
    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        raise FileError(_describe(error, document.get("padconvert"))) from None


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _describe(error: ValidationError, writer: object) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = quote(".".join(str(part) for part in first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        by = f"it was written by padconvert {quote(str(writer))}"
        return f"the padconvert manifest has a key unknown here, {where}: {by}; a newer padconvert is needed."
    return f"the padconvert manifest is damaged: {where}: {first['msg']}."
