"""What a file holds: of a source every layer and what the policy would do with it, of an artefact what was done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from padconvert.account import idle_numbers, layer_results, planned_totals
from padconvert.checkpoint.header import Header
from padconvert.checkpoint.layout import all_expected
from padconvert.checkpoint.manifest import LayerEntry, Manifest
from padconvert.checkpoint.read import is_artefact, read_checkpoint
from padconvert.errors import NothingEligibleError, UsageError
from padconvert.finetune.train import check_data
from padconvert.kinds import kinds_of_inputs, said_of_kinds
from padconvert.layers.packed import UnitView
from padconvert.listing import list_tensors, of_tensors, unconverted
from padconvert.load import Source, open_source
from padconvert.load.opened import open_input
from padconvert.options import ConvertOptions
from padconvert.plan import ITEMSIZE, Plan, make_plan
from padconvert.plan.cost import active_copies
from padconvert.plan.decide import verdicts
from padconvert.progress import Silent
from padconvert.results import Holdings, Inspection, LayerResult
from padconvert.task import open_task, walk_with
from padconvert.walk import LayerInfo, walk_trying
from padconvert.words import Reason, Verdict


def inspect_file(path: str | Path, options: ConvertOptions) -> Inspection:
    """What is in `path`. Of an artefact and of a safetensors file without --arch only the header is read.

    Raises FileError, UnsafeError and PolicyError as a conversion would; that nothing is eligible is no error here.
    """
    path = Path(path)
    if not options.data and (options.task is not None or options.text_columns):
        raise UsageError("--task and --text-column say how data are read: name data with --data.")
    if is_artefact(path):
        if options.data:
            raise UsageError(f"--data: {path} is an artefact, whose routers are set; name the source instead.")
        return _of_artefact(path)
    if options.arch is None and (listed := list_tensors(path)) is not None:
        if options.data:
            raise UsageError(f"--data: {path} holds only tensors; name what builds its model with --arch.")
        return listed
    if options.data:
        return _with_kinds(path, options)
    source = open_source(
        path,
        arch=options.arch,
        arch_args=options.arch_args,
        trust=options.trust,
        state_key=options.state_key,
        hash=False,
        intact=False,
    )
    return _of_source(path, source, options)


# ---- a source


def _of_source(path: Path, source: Source, options: ConvertOptions) -> Inspection:
    sizes = {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in source.tensors.items()}
    if source.module is None:
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in source.tensors.items()}
        return of_tensors(path, source.kind, source.bytes, sizes, dtypes, source.notes)
    shape = None if options.input_shape is None else (1, *options.input_shape)
    found = walk_trying(source.module, shape)
    notes = (*source.notes, *found.notes)
    try:
        policy = options.resolve_policy()
        plan = make_plan(found, policy, route="trained", seed=options.seed, tensors=sizes)
    except NothingEligibleError as error:
        decided, _ = verdicts(found, policy)
        layers = tuple(_layer(each.info, each.verdict, each.reason) for each in decided)
        return Inspection(
            str(path),
            source.kind,
            source.bytes,
            unconverted(layers, sizes, source.bytes),
            layers,
            (*notes, str(error)),
        )
    layers = layer_results(plan, None)
    return Inspection(
        str(path), source.kind, source.bytes, _predicted(plan, source.bytes), layers, (*notes, *plan.notes)
    )


def _layer(info: LayerInfo, verdict: Verdict, reason: Reason) -> LayerResult:
    """A layer of a source in which nothing may be converted."""
    return LayerResult(
        name=info.name,
        aliases=info.aliases,
        kind=info.kind,
        verdict=verdict,
        reason=reason,
        detail=info.detail,
        type=info.type,
        role=info.role,
        dtype=info.dtype,
        weight_shape=info.weight_shape,
        macs=info.macs,
    )


def _predicted(plan: Plan, source_bytes: int) -> Holdings:
    """The plan's prediction; `Holdings` and `Totals` name the same things alike. The header is not known yet."""
    totals = planned_totals(plan, source_bytes)
    shared = {field.name for field in fields(Holdings)} & {field.name for field in fields(totals)} - {"bytes_header"}
    alike: dict[str, Any] = {name: getattr(totals, name) for name in shared}
    return Holdings(layers=len(plan.layers), converted=len(plan.converted), **alike)


def _with_kinds(path: Path, options: ConvertOptions) -> Inspection:
    """A source beside data: what a conversion with them would do, and of how many kinds each layer's inputs are.

    Raises NothingEligibleError where no layer would be converted, and what reading the data raises.
    """
    policy = options.resolve_policy()
    opened, data = open_task(open_input(path, options, torch.device("cpu")), policy.policy, options, Silent())
    assert data is not None, "data were named"
    check_data(opened.module, data, torch.device("cpu"))
    walked = walk_with(opened.static, options, data)
    plan = make_plan(walked, policy, route="trained", seed=options.seed, tensors=opened.sizes)
    kinds = kinds_of_inputs(opened, plan, data, options.seed)
    layers = tuple(replace(layer, separation=kinds.get(layer.name)) for layer in layer_results(plan, None))
    notes = (*opened.notes, *walked.notes, *plan.notes, said_of_kinds(kinds))
    mean = fmean(kinds.values()) if kinds else None
    predicted = _predicted(plan, opened.bytes)
    return Inspection(str(path), opened.kind, opened.bytes, predicted, layers, notes, separation=mean)


# ---- an artefact


def _of_artefact(path: Path) -> Inspection:
    checkpoint = read_checkpoint(path)
    manifest, header = checkpoint.manifest, checkpoint.header
    origin = manifest.provenance
    provenance: dict[str, object] = {
        "written by": f"padconvert {manifest.padconvert}",
        "source": f"{origin.source_kind}, sha256 {origin.source_sha256}",
        "route": origin.route,
        "seed": origin.seed,
        "device": f"{origin.device}, {origin.threads} thread{'' if origin.threads == 1 else 's'}",
        "versions": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
    }
    return Inspection(
        path=str(path),
        kind="artefact",
        bytes=header.file_size,
        totals=_held(manifest, header),
        layers=tuple(_stored(entry) for entry in manifest.layers),
        notes=("only the header was read: the tensors' checksums were not checked ('padconvert verify' does)",),
        trained=manifest.trained,
        provenance=provenance,
    )


def _stored(entry: LayerEntry) -> LayerResult:
    facts = entry.facts
    entries, dynamic = math.prod(facts.weight_shape), _dynamic_entries(entry)
    return LayerResult(
        name=entry.name,
        aliases=entry.aliases,
        kind=facts.kind.value,
        verdict=Verdict.CONVERT,
        reason=Reason.ALREADY_DYNAMIC,
        granularity=facts.granularity.value,
        num_experts=facts.num_experts,
        dynamic_ratio=dynamic / entries,
        n_static=entries - dynamic,
        n_dynamic=dynamic,
        detail="its experts are still equal" if entry.equal_experts else "",
        dtype=facts.dtype,
        weight_shape=facts.weight_shape,
        group=facts.group,
        place=facts.place.value,
        top_k=facts.top_k,
    )


def _held(manifest: Manifest, header: Header) -> Holdings:
    """Counts from the header; the source and the fully dynamic network follow from the layers' shapes."""
    parts = Counter[str]()
    numbers = Counter[str]()
    expected = all_expected(manifest)
    for name, slot in header.tensors.items():
        part = _part_of(name, expected)
        parts[part] += slot.nbytes
        numbers[part] += math.prod(slot.shape)
    dense = {entry.name: _dense(entry) for entry in manifest.layers}
    able = {entry.name: dense[entry.name] - _static_biases(entry) for entry in manifest.layers}
    itemsize = {entry.name: ITEMSIZE[entry.facts.dtype] for entry in manifest.layers}
    copies = {entry.name: entry.facts.num_experts - 1 for entry in manifest.layers}
    weights = sum(math.prod(entry.facts.weight_shape) for entry in manifest.layers)
    dynamic = sum(_dynamic_entries(entry) for entry in manifest.layers)
    source = numbers["untouched"] + sum(dense.values())
    source_bytes = parts["untouched"] + sum(dense[name] * itemsize[name] for name in dense)
    full = source_bytes + sum(able[name] * copies[name] * itemsize[name] for name in able) + parts["router"]
    stored = sum(numbers.values()) - numbers["masks"]
    at_work = {e.name: active_copies(e.facts.num_experts, e.facts.top_k) for e in manifest.layers}
    return Holdings(
        layers=len(manifest.layers),
        converted=len(manifest.layers),
        params_source=source,
        params_output=stored,
        params_fully_dynamic=source + sum(able[name] * copies[name] for name in able) + numbers["router"],
        bytes_source=None,
        bytes_output=header.file_size,
        bytes_fully_dynamic=full + header.data_start,
        bytes_values=parts["values"],
        bytes_masks=parts["masks"],
        bytes_router=parts["router"],
        bytes_header=header.data_start,
        tensor_bytes_source=source_bytes,
        tensor_bytes_output=header.file_size - header.data_start,
        tensor_bytes_fully_dynamic=full,
        dynamic_ratio=dynamic / weights if weights else 0.0,
        params_active_source=source,
        params_active_output=stored - idle_numbers(manifest, header),
        params_active_fully_dynamic=source + sum(able[n] * (at_work[n] - 1) for n in able) + numbers["router"],
    )


def _part_of(name: str, expected: Collection[str]) -> str:
    """What a stored tensor is: "values", "masks" or "router" of a converted layer, else "untouched"."""
    if name not in expected:
        return "untouched"
    if ".router." in f".{name}":
        return "router"
    return "masks" if name.endswith(("_bitmask", "_index")) else "values"


def _dense(entry: LayerEntry) -> int:
    return math.prod(entry.facts.weight_shape) + entry.facts.has_bias * entry.facts.weight_shape[0]


def _static_biases(entry: LayerEntry) -> int:
    """Bias entries that cannot be dynamic: where units are columns, the bias goes with none."""
    return entry.facts.has_bias * entry.facts.weight_shape[0] if entry.facts.unit_dim else 0


def _dynamic_entries(entry: LayerEntry) -> int:
    facts = entry.facts
    return facts.n_dynamic * UnitView(facts.weight_shape, facts.granularity, facts.unit_dim).size
