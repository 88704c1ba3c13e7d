"""A folded model → its tensors and manifest → a file."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import padconvert
from padconvert.checkpoint.layout import expected_tensors, join, placeholders
from padconvert.checkpoint.manifest import LayerEntry, Manifest, ProbeInput, ProbeRecord, Provenance
from padconvert.checkpoint.pieces import Content, Contents, place_of_content
from padconvert.checkpoint.probe_record import fits, record_outputs
from padconvert.checkpoint.write import WrittenFile, write_checkpoint
from padconvert.checkpoint.write_folder import write_folder
from padconvert.errors import UsageError
from padconvert.layers.pad import PARTS, PadLayer
from padconvert.walk.probe import ProbeSpec, call, flat_outputs
from padconvert.walk.quiet import device_of, untouched

PROBE_SAMPLES = 4


def save_model(
    model: nn.Module,
    path: Path,
    *,
    architecture: Mapping[str, Any],
    provenance: Provenance,
    policy: Mapping[str, Any],
    trained: bool,
    probe: ProbeSpec | None = None,
    packed: Packed | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    source: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> WrittenFile:
    """Write a folded model in checkpoint format 1. Experts that were not trained and are all equal are stored once.

    `packed` is what `model` does not hold itself, `extra_tensors` what `architecture` needs beside the state dict. With
    `max_shard_size` (bytes of tensors) `path` is a folder, of one file or of several with an index. Raises as
    `write_checkpoint` and `write_folder` do.
    """
    extra = dict(extra_tensors or {})
    manifest = Manifest(
        padconvert=padconvert.__version__,
        layers=entries_of(model, trained=trained),
        architecture=dict(architecture),
        policy=dict(policy),
        provenance=provenance,
        trained=trained,
        probe=record_of(model, probe, packed),
        extra_tensors=tuple(sorted(extra)),
    )
    tensors = contents(model, manifest.layers, packed) | extra
    if max_shard_size is None:
        return write_checkpoint(path, tensors, manifest, force=force, source=source, check=check)
    return write_folder(path, tensors, manifest, max_shard_size=max_shard_size, force=force, source=source, check=check)


@dataclass(frozen=True, slots=True)
class Packed:
    """What a model does not hold itself: `tensors` of its converted layers, by their names in a checkpoint, and the
    `outputs` that it has on the probe's inputs."""

    tensors: Contents
    outputs: Sequence[Tensor]


def record_of(model: nn.Module, probe: ProbeSpec | None, packed: Packed | None) -> ProbeRecord | None:
    """The probe's record: of the model's outputs, or of those that it is known to have."""
    if probe is None:
        return None
    return record_probe(model, probe) if packed is None else _record(probe, packed.outputs)


def contents(model: nn.Module, entries: Iterable[LayerEntry], packed: Packed | None) -> dict[str, Content]:
    """As `model_tensors`, with what is packed, under all names of its layer."""
    found: dict[str, Content] = dict(model_tensors(model, entries))
    if packed is not None:
        for entry in entries:
            inside = [name for name in expected_tensors(entry) if name in packed.tensors]
            for prefix in (entry.name, *entry.aliases):
                for name in inside:
                    found[prefix + name[len(entry.name) :]] = packed.tensors[name]
    return found


def entries_of(model: nn.Module, *, trained: bool) -> tuple[LayerEntry, ...]:
    """What a manifest says of the model's converted layers. Raises UsageError where one is not folded."""
    names: dict[PadLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PadLayer):
            names.setdefault(module, []).append(name)
    return tuple(_entry(layer, *all_, equal=not trained and layer.experts_are_equal) for layer, all_ in names.items())


def _entry(layer: PadLayer, name: str, *aliases: str, equal: bool) -> LayerEntry:
    if layer.scale_logit is not None:
        raise UsageError(f"layer '{name}' is not folded, and only folded models are stored: padconvert.fold(model).")
    return LayerEntry(name=name, aliases=aliases, equal_experts=equal, facts=layer.facts())


def model_tensors(model: nn.Module, entries: Iterable[LayerEntry]) -> dict[str, Tensor]:
    """The state dict as a checkpoint stores it: of equal experts the first one alone."""
    tensors: dict[str, Tensor] = {name: value.detach() for name, value in model.state_dict().items()}
    for entry in entries:
        if entry.equal_experts:
            for prefix in (entry.name, *entry.aliases):
                for part in PARTS:
                    key = join(prefix, f"{part}_dynamic")
                    if key in tensors:
                        tensors[key] = tensors[key][:1]
    return tensors


def directory_tensors(
    model: nn.Module, entries: Sequence[LayerEntry], packed: Packed | None = None
) -> tuple[dict[str, Content], dict[str, str]]:
    """What a transformers directory stores of a model, and the further names of its tied tensors.

    A tied tensor is stored under the name that the model ties the others to, as transformers does. Each converted
    layer has a placeholder (see `layout.placeholders`).
    """
    tensors = contents(model, entries, packed)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    aliases = {
        name: kept
        for name, kept in tied.items()
        if name in tensors and kept in tensors and place_of_content(tensors[name]) == place_of_content(tensors[kept])
    }
    for name, (dtype, shape) in placeholders(entries).items():
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def record_probe(model: nn.Module, probe: ProbeSpec) -> ProbeRecord | None:
    """The model's outputs on `PROBE_SAMPLES` seeded samples, in eval mode; None where a reader would refuse to make
    inputs that large."""
    if not fits(PROBE_SAMPLES, (spec.shape for spec in probe.inputs)):
        return None
    return _record(probe, probe_outputs(model, probe))


def probe_outputs(model: nn.Module, probe: ProbeSpec) -> list[Tensor]:
    """The model's outputs in eval mode on the samples that a record is of."""
    args, kwargs = probe.make(PROBE_SAMPLES, device_of(model))
    with untouched(model):
        return flat_outputs(call(model, args, kwargs))


def _record(probe: ProbeSpec, outputs: Sequence[Tensor]) -> ProbeRecord:
    inputs = tuple(ProbeInput(s.name, s.shape, s.dtype, s.high, s.low) for s in probe.inputs)
    return ProbeRecord(seed=probe.seed, inputs=inputs, outputs=record_outputs(outputs), batch=PROBE_SAMPLES)


def provenance_of(*, source_sha256: str | None, source_kind: str, device: str, seed: int, trained: bool) -> Provenance:
    """Where an artefact comes from: what has to be the same for the same bytes."""
    return Provenance(
        source_sha256=source_sha256,
        source_kind=source_kind,
        versions={
            "padconvert": padconvert.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        device=device,
        threads=torch.get_num_threads(),
        seed=seed,
        route="trained" if trained else "data-free",
    )
