"""Two models, one batch, and the numbers between them: the receipts of a conversion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from padconvert.checkpoint.manifest import ProbeRecord
from padconvert.checkpoint.probe_record import compare_outputs
from padconvert.checkpoint.read import Checkpoint, read_checkpoint
from padconvert.errors import FileError, VerificationError
from padconvert.finetune.data.examples import Examples
from padconvert.finetune.data.sources import open_eval
from padconvert.finetune.evaluate import evaluate
from padconvert.finetune.objectives import dtype_of
from padconvert.finetune.train import check_examples
from padconvert.layers.build import Static, weight_of
from padconvert.layers.pad import PadLayer
from padconvert.layers.paths import shared
from padconvert.load import open_source
from padconvert.load.artefact import load_checkpoint
from padconvert.load.detect import InputKind, detect
from padconvert.load.directory_head import has_head
from padconvert.load.factory import architecture_of, build_factory
from padconvert.load.opened import module_of, open_input
from padconvert.load.source import Source
from padconvert.options import ConvertOptions
from padconvert.policy import Policy
from padconvert.precision import HALF, upcast_
from padconvert.results import Check, Equality, Verification
from padconvert.rewrite import pad_layers
from padconvert.surroundings import settled
from padconvert.task import label_numbers, tokenizer_for
from padconvert.verify_hf import check_loader, transformers_checks
from padconvert.walk.probe import InputSpec, ProbeSpec, call, flat_outputs
from padconvert.walk.quiet import device_of, evaluating, untouched

#: max|Δ| / max|y| that a function-preserving rewrite may show; half precision is checked upcast to fp32
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PROBE_SAMPLES = 8
SOURCE_CHECK = "source sha256"
#: examples of the evaluation data that the first promise is held on, and how many of them are run at once
EQUALITY_SAMPLES = 256
EQUALITY_BATCH = 64
EVALUATION_BATCH = 256

#: of an output recorded before, on another machine or thread count perhaps
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


#: why nothing was called, where nobody knows how to
NO_INPUTS = "no inputs are known that its forward takes; --input-shape names their shape"
_SAID = 200


def equality(source: nn.Module, model: nn.Module, probe: ProbeSpec | None, batches: Sequence[Call] = ()) -> Equality:
    """The first promise: by outputs on `batches` and on seeded probe inputs, or by weights where no call is possible.

    Raises VerificationError where a converted layer is never called.
    """
    calls = [*batches, *([probe.make(PROBE_SAMPLES, device_of(source))] if probe is not None else [])]
    why = _uncallable(source, calls[0]) if calls else NO_INPUTS
    return equality_by_weights(source, model, why) if why else equality_by_forward(source, model, calls)


def calls_on(examples: Examples, model: nn.Module) -> list[Call]:
    """The first examples as calls of `model`, in its dtype and on its device: `batches` for `equality`."""
    numbers = torch.arange(min(EQUALITY_SAMPLES, len(examples))).split(EQUALITY_BATCH)
    found = [examples.batch(each).to(device_of(model), dtype_of(model)).inputs for each in numbers]
    return [((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs) for inputs in found]


def runs(model: nn.Module, probe: ProbeSpec) -> bool:
    """Whether the model can be called with the probe's inputs."""
    return not _uncallable(model, probe.make(PROBE_SAMPLES, device_of(model)))


def _uncallable(source: nn.Module, each: Call) -> str:
    """Why the source itself cannot be called so, "" where it can; that says nothing about the conversion."""
    args, kwargs = each
    try:
        with untouched(source):
            return "" if flat_outputs(call(source, args, kwargs)) else "the source's forward returns no tensor"
    except Exception as error:  # whatever the user's own code raises
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"the source's own forward raises {said[:_SAID]}"


def equality_by_forward(
    source: nn.Module,
    model: nn.Module,
    calls: Sequence[Call],
    *,
    known: Mapping[int, Sequence[Tensor]] | None = None,
    keep: list[list[Tensor]] | None = None,
) -> Equality:
    """Outputs of both models on the same inputs in eval mode, without training in between. `known` are outputs of the
    source by the number of their call; the model's are added to `keep`.

    Raises VerificationError where a converted layer is never called, for then it would be bypassed silently.
    """
    source, model, calls = _upcast(source), _upcast(model), [_upcast_call(each) for each in calls]
    dtype = _float_dtype(source)
    called: set[str] = set()
    max_abs = max_rel = 0.0
    samples = 0
    with evaluating(source), evaluating(model), _watching(pad_layers(model), called), torch.no_grad():
        for number, (args, kwargs) in enumerate(calls):
            expected = (known or {}).get(number) or flat_outputs(call(source, args, kwargs))
            found = flat_outputs(call(model, args, kwargs))
            if keep is not None:
                keep.append(found)
            difference, relative = distance(expected, found)
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
            samples += len(next(iter([*args, *kwargs.values()])))
    never = [name for name in pad_layers(model) if name not in called]
    if never:
        raise VerificationError(
            f"layer '{never[0]}' was converted but the model's forward never calls it (its weight is read by "
            f"another module, or not used at all). Keep it static: --set 'rules=[{{name: {never[0]}, convert: false}}]'"
        )
    tolerance = TOLERANCE[dtype]
    return Equality("forward", max_abs, max_rel, tolerance, max_rel <= tolerance, samples)


def equality_by_weights(source: nn.Module, model: nn.Module, why: str = "") -> Equality:
    """max |Σ_k π_k D_k − W| over all converted layers: for models that cannot be called here.

    Every expert is held against the static weight, which covers all routing weights at once.
    """
    max_abs = max_rel = 0.0
    dtype = torch.float32
    for name, layer in pad_layers(model).items():
        static = source.get_submodule(name)
        dtype = layer.mixing_dtype
        for part in layer.parts:
            expected = getattr(static, part).detach().to(dtype)
            difference, relative = distance(
                [expected.expand(layer.num_experts, *expected.shape)], [layer.expert_tensors(part).detach()]
            )
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
    tolerance = TOLERANCE[dtype]
    return Equality("weights", max_abs, max_rel, tolerance, max_rel <= tolerance, 0, why)


def equality_by_one(source: nn.Module, model: nn.Module, why: str = "") -> Equality:
    """As `equality_by_weights`, of a model whose equal experts are one in memory, and exactly."""
    max_abs = max_rel = 0.0
    for name, layer in pad_layers(model).items():
        static = cast(Static, source.get_submodule(name))
        for part in layer.parts:
            expected = weight_of(static) if part == "weight" else static.bias
            assert expected is not None
            found = shared.expert(layer, part).detach()
            difference, relative = distance([expected.detach().to(found)], [found])
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
    return Equality("weights", max_abs, max_rel, 0.0, max_rel == 0, 0, why)


def distance(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """(max|Δ|, the largest max|Δ| / max|y| of an output); infinite where shapes or non-finite places differ."""
    if len(expected) != len(found) or any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        return float("inf"), float("inf")
    max_abs = max_rel = 0.0
    for a, b in zip(expected, found, strict=True):
        if torch.equal(a, b):
            continue  # a copy in fp64 of what is large would be another
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = (
            float((a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0).max())
            if a.numel()
            else 0.0
        )
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        max_abs = max(max_abs, difference)
        max_rel = max(max_rel, difference / scale if scale > 0 else difference)
    return max_abs, max_rel


@contextmanager
def _watching(layers: Mapping[str, PadLayer], called: set[str]) -> Iterator[None]:
    """Note which layers a forward calls."""

    def note(name: str) -> Any:
        return lambda module, args: called.add(name)  # noqa: ARG005

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _float_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _upcast(model: nn.Module) -> nn.Module:
    """The model itself, or an fp32 copy where it holds half-precision parameters."""
    if any(p.dtype in HALF for p in model.parameters()):
        return copy.deepcopy(model).float()
    return model


def _upcast_call(each: Call) -> Call:
    args, kwargs = each

    def up(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value

    return tuple(up(value) for value in args), {key: up(value) for key, value in kwargs.items()}


# ---- a stored probe ----------------------------------------------------------------------------------------------


def probe_check(checkpoint: Checkpoint, model: nn.Module, outputs: Sequence[Tensor] | None = None) -> Check:
    """The model's outputs on the manifest's probe, where they are not known yet, against the recorded ones, relative
    to max|y|."""
    record = checkpoint.manifest.probe
    if record is None:
        why = "none was stored: the model could not be called when it was made, or was trained and saved again since"
        return Check("probe", True, None, None, why, held=False)
    try:
        if outputs is None:
            args, kwargs = spec_of(record).make(record.batch, device_of(model))
            with untouched(model):
                outputs = flat_outputs(call(model, args, kwargs))
    except Exception as error:  # whatever the model's own code raises, or a record that cannot be made
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check("probe", False, None, None, f"the model cannot be called as when it was made ({why})")
    try:
        _, relative = compare_outputs(record, outputs)
    except (VerificationError, FileError) as error:
        return Check("probe", False, None, None, str(error))
    limit = PROBE_TOLERANCE[_coarsest(outputs)]
    return Check("probe", relative <= limit, relative, limit, "outputs as when it was made, max|Δ| / max|y|")


def spec_of(record: ProbeRecord) -> ProbeSpec:
    """The recorded probe as inputs that can be made again."""
    inputs = tuple(InputSpec(i.name, i.shape, i.dtype, i.high, i.low) for i in record.inputs)
    return ProbeSpec(inputs, record.seed, "the artefact's manifest")


def _coarsest(outputs: Sequence[Tensor]) -> torch.dtype:
    return max((output.dtype for output in outputs), key=PROBE_TOLERANCE.__getitem__, default=torch.float32)


# ---- verify ------------------------------------------------------------------------------------------------------


def verify(
    artefact: Path,
    *,
    against: Path | None = None,
    data: Sequence[str] = (),
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    trust: Sequence[str] = (),
    state_key: str | None = None,
    device: str = "cpu",
    loader: str | None = None,
) -> Verification:
    """Hold an artefact against what was recorded when it was made, and against its source if that is named.

    Checks: every tensor's crc32, that it loads, its probe; with `against` the source's sha256 and, for an artefact
    that was not trained, equal outputs; with `data` its metrics, read as the artefact's policy says (held against the
    source's where both are named, else only measured). Of another file than the source only the sha256 is held.
    `loader` "hf": a transformers directory is loaded by transformers too, with and without padconvert.hf.
    Raises FileError where it cannot be read at all, UnsafeError where loading it needs code that nobody trusts.
    """
    checkpoint = read_checkpoint(artefact)
    check_loader(loader, checkpoint)
    checks = [_checksums(checkpoint)]
    if checks[0].passed:
        with settled(device) as place:
            into = build_factory(architecture_of(arch, arch_args or {})) if arch else None
            model = load_checkpoint(checkpoint, into=into, trust=trust).to(place)
            checks += [Check("loads", True, None, None), probe_check(checkpoint, model)]
            if loader is not None:
                checks += transformers_checks(checkpoint, model, _recorded_call(checkpoint, place))
            options = ConvertOptions(arch=arch, arch_args=arch_args or {}, trust=tuple(trust), state_key=state_key)
            source = None if against is None else _open_against(against, options, place)
            if source is not None:
                checks += _against_source(checkpoint, model, source, place)
            if any(check.name == SOURCE_CHECK and not check.passed for check in checks):
                source = None  # a stranger's metrics are no measure
            if data:
                checks.append(_metrics_check(checkpoint, model, source, data, place))
    return Verification(str(artefact), tuple(checks), all(check.passed for check in checks))


def _recorded_call(checkpoint: Checkpoint, device: torch.device) -> Call | None:
    record = checkpoint.manifest.probe
    return None if record is None else spec_of(record).make(record.batch, device)


def _open_against(path: Path, options: ConvertOptions, device: torch.device) -> Source:
    """What the artefact was made from: a source, or the artefact that training went on from."""
    if detect(path) is not InputKind.ARTEFACT:
        return open_source(
            path, arch=options.arch, arch_args=options.arch_args, trust=options.trust, state_key=options.state_key
        )
    opened = open_input(path, options, device)
    return Source(path, opened.kind, opened.module, {}, opened.architecture, opened.bytes, opened.sha256)


def _checksums(checkpoint: Checkpoint) -> Check:
    found = checkpoint.verify_crc()
    damaged = [check for check in found if not check.passed]
    detail = damaged[0].detail if damaged else ""
    return Check("checksums", not damaged, f"{len(found) - len(damaged)} of {len(found)} tensors", None, detail)


def _against_source(checkpoint: Checkpoint, model: nn.Module, source: Source, device: torch.device) -> Iterator[Check]:
    wanted, found = checkpoint.manifest.provenance.source_sha256, source.sha256
    same = wanted == found
    detail = "" if same else "this is not the file that the artefact was made from"
    yield Check(SOURCE_CHECK, same, str(found)[:16], str(wanted)[:16], detail)
    if checkpoint.manifest.trained or not same:
        return
    module = module_of(source).to(device)
    record = checkpoint.manifest.probe
    equal = equality(module, model, None if record is None else spec_of(record))
    by_forward = equal.method == "forward"
    name = "same function as the source" if by_forward else "same weights as the source"
    detail = (
        "max|Δ| / max|y| before training, by forward"
        if by_forward
        else f"max|ΣπD − W| / max|W| before training; no forward was compared: {equal.why}"
    )
    yield Check(name, equal.passed, equal.max_rel_diff, equal.tolerance, detail)


def _metrics_check(
    checkpoint: Checkpoint, model: nn.Module, source: Source | None, data: Sequence[str], device: torch.device
) -> Check:
    """Accuracy (or the first other metric) on `data`, read as the artefact's policy says."""
    policy = Policy.model_validate_json(json.dumps(checkpoint.manifest.policy))
    spec = policy.data
    places = [checkpoint.path, *([source.path] if source is not None else [])]
    tokenizer = next((each for place in places if (each := tokenizer_for(place, policy, data))), None)
    words = label_numbers(checkpoint.manifest.architecture)
    examples = open_eval(spec, data, tokenizer=tokenizer, label2id=words)
    check_examples(model, examples, ", ".join(data), device)
    found = evaluate(upcast_(copy.deepcopy(model)), examples, EVALUATION_BATCH, device=device)
    if not found:
        raise FileError(f"{', '.join(data)}: has no labels, so there is nothing to measure. Name labelled data.")
    name = "accuracy" if "accuracy" in found else "loss"
    if source is None or (has_head(checkpoint.manifest.architecture) and not has_head(source.architecture)):
        why = "measured; nothing to hold it against" if source is None else "measured; the source has no head for it"
        return Check(name, True, found[name], None, why, held=False)
    module = upcast_(copy.deepcopy(module_of(source))).to(device)
    before = evaluate(module, examples, EVALUATION_BATCH, device=device)
    if name == "loss":
        return Check(name, found[name] <= before[name], found[name], before[name], "at most the source's")
    noise = 2 * (sum(m[name] * (1 - m[name]) for m in (found, before)) / len(examples)) ** 0.5
    limit = before[name] - noise
    return Check(name, found[name] >= limit, found[name], limit, f"the source's {before[name]:.4f} less chance")
