"""The whole line: saved model → walk → plan → rewrite → (warm up, partition)* → fold → checkpoint → verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from padconvert.account import card_lines, file_totals, layer_results, planned_totals
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.whole_file import write_text
from padconvert.checkpoint.whole_folder import check_folder_target
from padconvert.checkpoint.write import check_target
from padconvert.checksum import Checksum
from padconvert.errors import UsageError, VerificationError
from padconvert.finetune.data.sources import Data
from padconvert.finetune.train import check_rounds, objective_of
from padconvert.finetune.usage import collapse_warnings
from padconvert.fold import fold_
from padconvert.gates import accuracy_gate, hold, layers_gate, memory_gate, missed, size_gate, strict_gate
from padconvert.load import least_memory
from padconvert.load.opened import Opened, open_input
from padconvert.neighbours import Trained, train_
from padconvert.options import ConvertOptions
from padconvert.plan import Plan, Route, check_plan_fits, check_plan_terms, make_plan, plan_to_json, read_plan
from padconvert.plan.cost import cost_of
from padconvert.plan.memory import least_file_bytes, peak_memory
from padconvert.policy import Policy, Resolved
from padconvert.precision import restore_dtypes_
from padconvert.progress import Progress, Silent
from padconvert.results import Comparison, Conversion, Equality, Gate, OutputFile, SourceFile
from padconvert.seal import Seal, becomes_folder
from padconvert.stream import Stream, stream
from padconvert.surroundings import Clock, resumable, settled
from padconvert.task import open_task, walk_with
from padconvert.verify import Call, calls_on, equality
from padconvert.walk.info import Walk
from padconvert.walk.probe import ProbeSpec

SUFFIX = ".pad.safetensors"
#: passes over the training data from which conversions of finished networks gained on all tasks of docs/results.md
PASSES_THAT_PAID = 14


def convert(
    source: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    *,
    checksum: Checksum | None = None,
) -> Conversion:
    """Convert a saved model as `options` say and return what came of it. Nothing is written unless all of it holds.
    `checksum` is the source's, where it is a file and that was begun already.

    Raises a `PadconvertError`: UsageError and PolicyError for what was asked, FileError and UnsafeError for what was
    read or cannot be written, NothingEligibleError, VerificationError where a receipt does not hold, and Interrupted.
    """
    options, progress, clock = options or ConvertOptions(), progress or Silent(), Clock()
    resolved = options.resolve_policy()
    output = options.output or default_output(Path(source))
    _check_files(Path(source), output, options)
    with settled(options.device) as device, resumable(options):
        progress.stage("load")
        input_ = open_input(Path(source), options, device, checksum)
        opened, data = open_task(input_, resolved.policy, options, progress)
        clock.lap("load")

        progress.stage("plan")
        walked = walk_with(opened.static, options, data)
        plan, why_not = _plan(opened, walked, resolved, options, data)
        if options.plan_out is not None:
            write_text(options.plan_out, plan_to_json(plan))
        gates = _planned_gates(opened, plan, options, data)
        clock.lap("plan")
        if options.dry_run:
            return _dry_run(opened, plan, walked, resolved, options, clock, gates)

        if plan.route == "data-free" or data is None:
            made = _streamed(opened, plan, walked, data, progress, clock)
        else:
            made = _fine_tuned(opened, plan, walked.probe, data, options, device, progress, clock)
        gates = hold((*gates, *_measured_gates(made.trained.comparison, options)))

        progress.stage("write")
        said = card_lines(made.trained.comparison, made.trained.routers, plan.policy.data.task)
        written = Seal(opened, plan, walked.probe, options, gates, made.stream, said).write(made.model, output)
        clock.lap("write")
    return Conversion(
        source=SourceFile(str(source), opened.kind, opened.bytes, opened.sha256),
        output=OutputFile(str(output), written.bytes, written.sha256),
        totals=file_totals(plan, read_checkpoint(output), made.model, opened.sizes, opened.bytes),
        layers=layer_results(plan, made.model),
        equality=made.equality,
        metrics=made.trained.comparison,
        route=plan.route,
        seed=options.seed,
        timing=clock.laps,
        warnings=(*why_not, *made.trained.warnings, *collapse_warnings(made.trained.routers)),
        notes=_notes(opened, resolved, plan, walked, data),
        plan_file=_name(options.plan_out),
        history=tuple(made.trained.history),
        routers=made.trained.routers,
        gates=(*gates, *size_gate(written.bytes, options.max_size)),
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """The output's network, ready to be written. Streamed, it is held against the source as it is written."""

    model: nn.Module
    trained: Trained
    checked: Equality | None = None
    stream: Stream | None = None

    @property
    def equality(self) -> Equality | None:
        return self.checked if self.stream is None else self.stream.equal


def _streamed(
    opened: Opened,
    plan: Plan,
    walked: Walk,
    data: Data | None,
    progress: Progress,
    clock: Clock,
) -> _Made:
    progress.stage("rewrite")
    streamed = stream(opened, plan, walked, _seen(opened, data))
    clock.lap("rewrite")
    return _Made(streamed.model, Trained(), stream=streamed)


def _fine_tuned(
    opened: Opened,
    plan: Plan,
    probe: ProbeSpec | None,
    data: Data,
    options: ConvertOptions,
    device: torch.device,
    progress: Progress,
    clock: Clock,
) -> _Made:
    progress.stage("rewrite")
    model = opened.dynamic_copy(plan)
    equal = equality(opened.module, model, probe, _seen(opened, data))
    if not equal.passed:
        raise VerificationError(_unequal(equal))
    clock.lap("rewrite")

    trained = train_(opened, model, plan, data, options, device, progress)
    fold_(model)
    restore_dtypes_(model, opened.module)
    clock.lap("train")
    return _Made(model, trained, equal)


def _seen(opened: Opened, data: Data | None) -> list[Call]:
    """Examples to hold the first promise on."""
    return [] if data is None else calls_on(data.eval or data.train, opened.module)


def default_output(source: Path) -> Path:
    """`model.pt` → `model.pad.safetensors`, beside it; a folder `d` → `d.pad`. An artefact's own output needs `-o`."""
    if source.is_dir():
        folder = source.resolve()
        return folder.with_name(folder.name.removesuffix(".pad") + ".pad")
    name = source.name.removesuffix(SUFFIX) if source.name.endswith(SUFFIX) else source.stem
    return source.with_name(name + SUFFIX)


def _measured_gates(measured: Comparison | None, options: ConvertOptions) -> tuple[Gate, ...]:
    if measured is None:
        return ()
    return accuracy_gate(measured.source, measured.output, options.max_accuracy_drop)


def _check_files(source: Path, output: Path, options: ConvertOptions) -> None:
    """Nothing that is there is replaced unasked, and no file is asked to be two things."""
    inside = options.work_dir is not None and options.work_dir.resolve().is_relative_to(source.resolve())
    if inside and source.is_dir():
        raise UsageError(
            f"--work-dir {options.work_dir}: lies in the source, which stays as it is; name another folder."
        )
    if not options.dry_run:
        check = check_folder_target if becomes_folder(source, output, options) else check_target
        check(output, force=options.force, source=source)
        _check_not_read(output, options)
    if options.plan_out is not None:
        check_target(options.plan_out, force=options.force, source=source, option="--plan-out")
        _check_not_read(options.plan_out, options)
        if not options.dry_run and options.plan_out.resolve() == output.resolve():
            raise UsageError(f"--plan-out {options.plan_out}: is the output as well; name another file.")
    _check_fits(source, options)


def _check_not_read(target: Path, options: ConvertOptions) -> None:
    """Raises UsageError for an output that is one of this run's inputs, forced or not."""
    inputs = (*options.data, *options.eval_data, options.policy, options.plan)
    for path in (Path(each) for each in inputs if each is not None):
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError(f"{target} is read by this run, so it is never overwritten; name another file.")


def _check_fits(source: Path, options: ConvertOptions) -> None:
    """Raises GateError for a source whose tensors alone take more memory than the run may."""
    if options.max_memory is not None:
        least = least_memory(source, options.state_key)
        hold(missed(memory_gate(least, options.max_memory, "source_bytes")))


# ---- plan --------------------------------------------------------------------------------------------------------


def _plan(
    opened: Opened, walked: Walk, resolved: Resolved, options: ConvertOptions, data: Data | None
) -> tuple[Plan, list[str]]:
    """The plan to follow, and why nothing will be trained although there is data."""
    policy = resolved.policy
    why_not = None if data is None else objective_of(policy, data).why_not
    if opened.goes_on:
        if data is None or why_not is not None:
            raise UsageError(why_not or "A fine-tuned artefact can only be trained on: name data with --data.")
        resolved = Resolved(_going_on(opened, policy), {}, resolved.notes)
    route: Route = "data-free" if data is None or why_not is not None else "trained"
    _check_trains(route, options, why_not)
    if route == "trained" and not opened.goes_on:
        check_rounds(policy)
    if options.max_accuracy_drop is not None:
        _check_measurable(data, "--max-accuracy-drop", accuracy=True)
    if options.compare or (route == "trained" and policy.train.compare):
        _check_measurable(data, "--compare", accuracy=False)
    if options.plan is not None:
        plan = read_plan(options.plan)
        check_plan_fits(plan, walked, opened.sha256)
        check_plan_terms(plan, route, options.seed, resolved, f"--plan {options.plan}", preset=options.preset)
    else:
        plan = make_plan(
            walked, resolved, route=route, seed=options.seed, tensors=opened.sizes, source_sha256=opened.sha256
        )
    return plan, [] if why_not is None else [why_not]


def _check_trains(route: Route, options: ConvertOptions, why_not: str | None) -> None:
    """Raises UsageError for an option that only training can obey where nothing is trained."""
    flags = ("compare", "eval_data", "steps", "batch_size", "lr", "max_accuracy_drop")
    # by identity: a bound of 0 is one, though it equals False
    given = [flag for flag in flags if not any(getattr(options, flag) is no for no in (None, False, ()))]
    asked = ["--" + flag.replace("_", "-") for flag in given]
    if route == "data-free" and asked:
        raise UsageError(f"{asked[0]}: nothing is trained in this run. {why_not or 'Name training data with --data.'}")


def _check_measurable(data: Data | None, option: str, *, accuracy: bool) -> None:
    """Raises UsageError unless there is evaluation data with labels; of classes, where it is for an `accuracy`."""
    assert data is not None, "something is trained"
    if data.eval is None:
        raise UsageError(f"{option}: nothing is held out to measure on; name --eval-data or data.holdout.")
    labels = data.eval.batch(torch.zeros(1, dtype=torch.int64)).labels
    if labels is None:
        raise UsageError(f"{option}: the evaluation data has no labels, so there is nothing to measure. Name some.")
    if accuracy and labels.is_floating_point():
        raise UsageError(f"{option}: the evaluation data has numbers for labels, not classes, so there is no accuracy.")


def _planned_gates(opened: Opened, plan: Plan, options: ConvertOptions, data: Data | None) -> tuple[Gate, ...]:
    """The bounds that the plan decides. Raises GateError before any work where one is not met; a file may be refused
    here already, but is only admitted once it is written."""
    peak = peak_memory(
        plan,
        controls=options.compare or plan.policy.train.compare,
        train_samples=0 if data is None else len(data.train),
        eval_samples=0 if data is None or data.eval is None else len(data.eval),
    )
    return hold(
        (
            *strict_gate(options.strict),
            *layers_gate(len(plan.converted), options.require_layers),
            *memory_gate(peak, options.max_memory),
            *missed(size_gate(_least_bytes(opened, plan), options.max_size, "tensor_bytes")),
        )
    )


def _least_bytes(opened: Opened, plan: Plan) -> int:
    return least_file_bytes(plan) - opened.repeated_bytes


def _going_on(opened: Opened, policy: Policy) -> Policy:
    """This run's training and data on the artefact's own partition."""
    defaults, ffn = (section.model_copy(update={"convert": False}) for section in (policy.defaults, policy.ffn))
    partition = policy.partition.model_copy(update={"scope": "layer"})
    return policy.model_copy(update={"defaults": defaults, "ffn": ffn, "rules": opened.rules, "partition": partition})


def _dry_run(
    opened: Opened,
    plan: Plan,
    walked: Walk,
    resolved: Resolved,
    options: ConvertOptions,
    clock: Clock,
    gates: tuple[Gate, ...],
) -> Conversion:
    notes = _notes(opened, resolved, plan, walked, None)
    if options.max_size is not None:
        least = f"at least {_least_bytes(opened, plan):,} bytes of tensors, and a header comes on top"
        notes += (f"--max-size {options.max_size:,} is decided by the written file: it will have {least}",)
    return Conversion(
        source=SourceFile(str(opened.path), opened.kind, opened.bytes, opened.sha256),
        output=None,
        totals=planned_totals(plan, opened.bytes),
        layers=layer_results(plan, None),
        equality=None,
        metrics=None,
        route=plan.route,
        seed=options.seed,
        timing=clock.laps,
        warnings=(),
        notes=notes,
        plan_file=_name(options.plan_out),
        gates=gates,
    )


def _notes(opened: Opened, resolved: Resolved, plan: Plan, walked: Walk, data: Data | None) -> tuple[str, ...]:
    """What a person wants to know, each thing once: a plan brings its policy's notes along."""
    said = (*opened.notes, *resolved.notes, *plan.notes, *walked.notes, *(data.notes if data is not None else ()))
    return tuple(dict.fromkeys((*said, *_once_trained(opened, plan), *_few_passes(plan, data))))


def _few_passes(plan: Plan, data: Data | None) -> list[str]:
    """That a fine-tune is short, for one that is."""
    train = plan.policy.train
    if data is None or plan.route != "trained" or not plan.converted:
        return []
    passes = train.steps * min(train.batch_size, len(data.train)) / len(data.train)
    if passes >= PASSES_THAT_PAID:
        return []
    return [
        f"{train.steps} steps show each training example {passes:.2g} times. Of networks trained to their end most "
        f"gained on the static one only where they saw each {PASSES_THAT_PAID} times or more (docs/results.md; --steps)"
    ]


def _once_trained(opened: Opened, plan: Plan) -> list[str]:
    """What fine-tuning makes of an artefact whose experts are still equal, and stored once."""
    if plan.route == "trained" or not plan.converted:
        return []
    cost = cost_of(plan.layers, plan.pools, "trained", opened.sizes)
    params, size = cost.params_output / cost.params_source, cost.bytes_output / cost.bytes_source
    return [
        f"its experts are equal and stored once; fine-tuning makes them differ: {params:.2f}× the source's parameters, "
        f"{size:.2f}× its tensor bytes"
    ]


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _unequal(equal: Equality) -> str:
    return (
        f"The rewritten model does not compute what the source computes: max|Δ|/max|y| = {equal.max_rel_diff:.2e}, "
        f"at most {equal.tolerance:.0e} is allowed. Nothing was written. Convert fewer layers (policy rules) to find "
        "the one, and please report it."
    )
