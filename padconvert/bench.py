"""`bench`: an artefact beside the static network it came from and the fully dynamic one, in time and memory.

The fully dynamic network is the same plan with κ = 1, built from the artefact. All three are called in turn on the same
inputs, with a fixed number of threads, so the ratios hold on a busy machine too; the seconds do not.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from padconvert.checkpoint.read import Checkpoint, read_checkpoint
from padconvert.contenders import FULL, OUTPUT, STATIC, Call, bytes_of, fully_dynamic, make_unequal_, peak_bytes
from padconvert.errors import FileError, Interrupted, PadconvertError, UsageError
from padconvert.finetune.data.sources import open_eval
from padconvert.finetune.objectives import dtype_of
from padconvert.layer_times import layer_times, tuned_paths
from padconvert.load.artefact import load_checkpoint
from padconvert.load.factory import architecture_of, build_factory
from padconvert.load.opened import Opened, open_input
from padconvert.options import ConvertOptions
from padconvert.paired import QUICK, THOROUGH, Effort, Paired, measure
from padconvert.policy import Policy
from padconvert.progress import Progress, Silent
from padconvert.results import Bench, BenchBatch, BenchLayer, Machine, Timed
from padconvert.surroundings import usable
from padconvert.task import label_numbers, tokenizer_for
from padconvert.verify import spec_of
from padconvert.walk.probe import ProbeSpec, call, find_probe, flat_outputs
from padconvert.walk.quiet import untouched

BATCH_SIZES = (1, 8, 32)
QUICK_BATCH_SIZES = (1, 8)
Inputs = Callable[[int], Call]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`threads` None: as many as torch takes by itself. `batch_sizes` empty: the default ones."""

    batch_sizes: tuple[int, ...] = ()
    threads: int | None = None
    quick: bool = False
    per_layer: bool = False
    input_shape: tuple[int, ...] | None = None
    data: tuple[str, ...] = ()
    arch: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    trust: tuple[str, ...] = ()
    state_key: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.batch_sizes):
            raise UsageError(f"--batch-size {min(self.batch_sizes)}: take a whole number of at least 1.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: take a whole number of at least 1.")
        if self.data and self.input_shape is not None:
            raise UsageError("--input-shape and --data both say what the inputs are; name one of them.")

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.batch_sizes or (QUICK_BATCH_SIZES if self.quick else BATCH_SIZES)

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else THOROUGH


def bench(
    artefact: Path, against: Path, options: BenchOptions | None = None, progress: Progress | None = None
) -> Bench:
    """Time and memory of the artefact, its source and the fully dynamic network at each batch size.

    Experts that are still equal are moved apart first. Inputs are the manifest's probe, unless the options name
    others. A Ctrl-C ends it with what was measured (`complete` False), or with Interrupted where that is nothing.
    Raises FileError where `against` is not what the artefact was made from, or the network cannot be called.
    """
    options, progress = options or BenchOptions(), progress or Silent()
    progress.stage("load")
    checkpoint = read_checkpoint(artefact)
    device = usable(options.device)
    source = _source(checkpoint, against, options, device)
    networks, notes = _networks(checkpoint, source, options, device)
    inputs, probe = _inputs(checkpoint, networks[STATIC], options, device)
    batches: list[BenchBatch] = []
    layers: list[BenchLayer] = []
    with _threads(options.threads) as threads, torch.no_grad():
        complete = _measure_all(networks, inputs, options, device, progress, batches, layers, notes)
    if not batches:
        raise _nothing(artefact, complete, notes)
    return Bench(
        artefact=str(artefact),
        source=str(against),
        machine=machine(device, threads),
        dtype=str(dtype_of(networks[STATIC])).removeprefix("torch."),
        inputs=probe,
        bytes_static=bytes_of(networks[STATIC]),
        bytes_output=bytes_of(networks[OUTPUT]),
        bytes_fully_dynamic=bytes_of(networks[FULL]),
        batches=tuple(batches),
        layers=tuple(layers),
        notes=tuple(notes),
        complete=complete,
    )


def machine(device: torch.device, threads: int) -> Machine:
    """This machine, in words that name no host."""
    words = str(device) if device.type != "cuda" else f"{device}, {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    vectors = torch.backends.cpu.get_cpu_capability()
    return Machine(words, cores, threads, vectors, torch.__version__.partition("+")[0], platform.python_version())


# ---- what is measured --------------------------------------------------------------------------------------------


def _source(checkpoint: Checkpoint, against: Path, options: BenchOptions, device: torch.device) -> Opened:
    reading = ConvertOptions(
        arch=options.arch, arch_args=options.arch_args, trust=options.trust, state_key=options.state_key
    )
    opened = open_input(against, reading, device)
    wanted = checkpoint.manifest.provenance.source_sha256
    if wanted is not None and wanted != opened.sha256:
        raise FileError(
            f"--against {against}: is not the file that {checkpoint.path} was made from (sha256 {opened.sha256[:16]}, "
            f"recorded {wanted[:16]}). Name that file."
        )
    return opened


def _networks(
    checkpoint: Checkpoint, source: Opened, options: BenchOptions, device: torch.device
) -> tuple[dict[str, nn.Module], list[str]]:
    """The three networks in eval mode, by name, and what is to be said about them."""
    into = build_factory(architecture_of(options.arch, options.arch_args)) if options.arch else None
    output = load_checkpoint(checkpoint, into=into, trust=options.trust)
    notes = ["its experts were still equal: they were moved apart before timing"] if make_unequal_(output) else []
    full = fully_dynamic(output)
    static = source.static.eval()
    _check_layers(checkpoint, static, source.path)
    return {STATIC: static, OUTPUT: output.to(device).eval(), FULL: full.to(device).eval()}, notes


def _check_layers(checkpoint: Checkpoint, static: nn.Module, path: Path) -> None:
    """An artefact of `padconvert.save` records no sha256 of a source: then the layers have to tell."""
    modules = dict(static.named_modules(remove_duplicate=False))
    for entry in checkpoint.manifest.layers:
        weight = getattr(modules.get(entry.name), "weight", None)
        order = -1 if entry.facts.transposed else 1  # transformers' Conv1D stores [in, out]
        if weight is None or tuple(weight.shape)[::order] != entry.facts.weight_shape:
            raise FileError(
                f"--against {path}: has no layer '{entry.name}' of shape {list(entry.facts.weight_shape)}, as "
                f"{checkpoint.path} has. Name the file that it was made from."
            )


def _inputs(
    checkpoint: Checkpoint, static: nn.Module, options: BenchOptions, device: torch.device
) -> tuple[Inputs, dict[str, tuple[int, ...]]]:
    """What makes a call of a given batch size, and the shapes of its inputs. Raises FileError where the network does
    not take it."""
    inputs = (
        _data_inputs(checkpoint, static, options, device)
        if options.data
        else _probe_inputs(checkpoint, static, options, device)
    )
    args, kwargs = inputs(min(options.sizes))
    try:
        with untouched(static):
            flat_outputs(call(static, args, kwargs))
    except Exception as error:  # whatever the network's own code raises
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(
            f"{checkpoint.path}: its network cannot be called with these inputs ({why:.200}). "
            "Name others with --input-shape or --data."
        ) from error
    named = [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]
    return inputs, {name: tuple(value.shape[1:]) for name, value in named}


def _probe_inputs(checkpoint: Checkpoint, static: nn.Module, options: BenchOptions, device: torch.device) -> Inputs:
    record = checkpoint.manifest.probe
    probe: ProbeSpec | None = None
    if options.input_shape is not None:
        probe = find_probe(static, (1, *options.input_shape))
    elif record is not None:
        probe = spec_of(record)
    if probe is None:
        raise FileError(
            f"{checkpoint.path}: holds no inputs to call it with, for its network could not be called when it was "
            "made. Name them: --input-shape 1,3,224,224 or --data."
        )
    found = probe
    return lambda size: found.make(size, device)


def _data_inputs(checkpoint: Checkpoint, static: nn.Module, options: BenchOptions, device: torch.device) -> Inputs:
    """The first examples of the data, read as the artefact's policy says; a batch larger than it repeats them."""
    policy = Policy.model_validate_json(json.dumps(checkpoint.manifest.policy))
    tokenizer = tokenizer_for(checkpoint.path, policy, options.data)
    words = label_numbers(checkpoint.manifest.architecture)
    examples = open_eval(policy.data, options.data, tokenizer=tokenizer, label2id=words)
    if not len(examples):
        raise FileError(f"{', '.join(options.data)}: holds no examples.")

    def make(size: int) -> Call:
        batch = examples.batch(torch.arange(size) % len(examples)).to(device, dtype_of(static))
        return ((batch.inputs,), {}) if isinstance(batch.inputs, torch.Tensor) else ((), batch.inputs)

    return make


# ---- measuring ---------------------------------------------------------------------------------------------------


@contextmanager
def _threads(number: int | None) -> Iterator[int]:
    """Inside, torch computes on this many threads."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _measure_all(
    networks: Mapping[str, nn.Module],
    inputs: Inputs,
    options: BenchOptions,
    device: torch.device,
    progress: Progress,
    batches: list[BenchBatch],
    layers: list[BenchLayer],
    notes: list[str],
) -> bool:
    """Fill `batches`, `layers` and `notes`, batch size by batch size. Returns whether nobody interrupted."""
    try:
        for size in options.sizes:
            progress.stage(f"batch of {size}")
            try:
                given = inputs(size)
                tuned_paths(networks[FULL], *given)
                paths = tuned_paths(networks[OUTPUT], *given)
                found = _batch(networks, given, size, options.effort, device, progress)
                batches.append(found[0])
                if not found[1]:
                    return False
                if options.per_layer:
                    progress.stage(f"layers, batch of {size}")
                    layers += layer_times(networks, given, size, paths, options.effort, device, progress)
            except (MemoryError, RuntimeError) as error:
                if not _is_memory(error):
                    raise
                notes.append(f"batch of {size}: there is not enough memory")
    except KeyboardInterrupt:
        return False
    return True


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        said in str(error) for said in ("can't allocate memory", "out of memory", "not enough memory")
    )


def _nothing(artefact: Path, complete: bool, notes: Sequence[str]) -> PadconvertError:
    if not complete:
        return Interrupted("interrupted before anything was measured")
    return FileError(f"{artefact}: could not be measured: {'; '.join(notes)}. Take smaller batches with --batch-size.")


def synchronised(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work`, until its result is there."""
    if device.type != "cuda":
        return work

    def wait() -> None:
        work()
        torch.cuda.synchronize(device)

    return wait


def _batch(
    networks: Mapping[str, nn.Module],
    given: Call,
    size: int,
    effort: Effort,
    device: torch.device,
    progress: Progress,
) -> tuple[BenchBatch, bool]:
    args, kwargs = given
    calls = {
        name: synchronised(lambda network=network: call(network, args, kwargs), device)  # type: ignore[misc]
        for name, network in networks.items()
    }
    found = measure(calls, effort, done=progress.step)
    peaks = {name: peak_bytes(work, device) if found.finished else None for name, work in calls.items()}
    timed = {name: timed_of(found, name, peaks[name]) for name in calls}
    over = found.ratio(OUTPUT, FULL).median
    return BenchBatch(size, found.rounds, timed[STATIC], timed[OUTPUT], timed[FULL], over), found.finished


def timed_of(found: Paired, name: str, peak: int | None = None) -> Timed:
    """One of the paired calls, beside the one that is called "static"."""
    seconds, over = found.spread(name), found.ratio(name, STATIC)
    return Timed(seconds.median, seconds.low, seconds.high, over.median, over.low, over.high, peak)
