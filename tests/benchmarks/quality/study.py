"""Runs what `experiments` lists and `results/` lacks; each run appends one JSON line to its task's file.

    PYTHONPATH=tests python -m benchmarks.quality.study [--task NAME]... [--minutes M] [--device D]

Interrupted or out of time, the same command goes on. Arms are paired: the same source, batches, augmentation and steps.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import padconvert
from benchmarks.quality import trials
from benchmarks.quality.arms import BASE, Arm, in_policys_words
from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from benchmarks.quality.routings import set_aligned_
from benchmarks.quality.tasks import TASKS, Task
from padconvert.account import planned_totals
from padconvert.finetune.data.examples import Subset
from padconvert.finetune.data.preparation import Prepared
from padconvert.finetune.data.sources import Data
from padconvert.finetune.evaluate import evaluate
from padconvert.finetune.loop import finetune_, start
from padconvert.finetune.train import Trainer
from padconvert.finetune.usage import router_use
from padconvert.partition import Partitioner
from padconvert.plan import Plan
from padconvert.plan.cost import ROUTER_BYTES
from padconvert.policy import load_policy
from padconvert.progress import Silent
from padconvert.rewrite import pad_layers

RESULTS = Path(__file__).resolve().parent / "results"
#: trained sources; made again where they are missing
SOURCES = Path(__file__).resolve().parents[3] / ".study"
#: those that results were taken from, as far as they are small: another machine or version of the code trains another
#: network from the same seed, and arms can only be paired that start from the same one
KEPT = RESULTS.with_name("sources")

#: training examples that are scored after the training, in batches of the test
TRAINED_BATCHES = 4

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One arm from one source at one learning rate."""

    task: Task
    arm: Arm
    seed: int
    rate: float

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.arm.settings) if self.arm.kind == "static" else self.arm.overrides(BASE, self.task.ratio)

    @property
    def key(self) -> dict[str, Any]:
        """What a result is found by: other terms or settings are another run."""
        return {
            "task": self.task.name, "terms": self.task.said, "arm": self.arm.name, "settings": self.settings,
            "seed": self.seed, "rate": self.rate,
        }  # fmt: skip


class Results:
    """The lines of `folder`, one file a task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Result] = []
        for path in sorted(folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{path}, line {number} is cut off ({error}): remove it") from error

    def of(self, run: Run) -> Result | None:
        key = json.loads(json.dumps(run.key))
        return next((line for line in self.lines if all(line[name] == value for name, value in key.items())), None)

    def add(self, run: Run, result: Result) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = run.key | result
        slug = "".join(c if c.isalnum() else "_" for c in run.task.name.lower())
        with (self.folder / f"{slug}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.lines.append(json.loads(json.dumps(line)))


def chosen_rate(results: Results, task: Task, arm: Arm, pilot: int) -> float | None:
    """The rate with the best held-out accuracy of the pilot seed's runs; None until all of them are there. A grid of
    one asks for no runs."""
    if len(task.rates) == 1:
        return task.rates[0]
    found = [results.of(Run(task, arm, pilot, rate)) for rate in task.rates]
    if any(result is None for result in found):
        return None
    scores = [result["held_out"][task.metric] for result in found if result is not None]
    return task.rates[scores.index(max(scores))]


def missing(experiments: Sequence[Experiment], results: Results, tasks: Sequence[str]) -> Iterator[Run]:
    """Runs without a result, in order: every arm's rates on every task's first seed, then the other seeds at the chosen
    one, each with all tasks before the next."""
    for experiment in experiments:
        asked = [TASKS[name] for name in experiment.tasks if not tasks or name in tasks]
        pilot, *others = experiment.seeds
        for task in asked:
            for arm in experiment.arms:
                rates = task.rates if experiment.rate is None else (experiment.rate,)
                yield from (Run(task, arm, pilot, rate) for rate in rates)
        for seed in others:
            for task, arm in itertools.product(asked, experiment.arms):
                rate = chosen_rate(results, task, arm, pilot) if experiment.rate is None else experiment.rate
                if rate is not None:  # else the pilot's own runs were left out
                    yield Run(task, arm, seed, rate)


# ---- one run -----------------------------------------------------------------------------------------------------


def source_of(task: Task, seed: int, device: torch.device) -> nn.Module:
    """The trained static network that every arm starts from; the same for the same task, terms and seed."""
    terms = hashlib.sha256(json.dumps([*task.source, seed]).encode()).hexdigest()[:16]
    if not task.pretrain:
        return _ready_made(task, seed, SOURCES / f"{terms}-whole.pt").to(device).eval()
    path, kept = SOURCES / f"{terms}-{device.type}.pt", KEPT / f"{terms}.safetensors"
    network = task.network(seed).to(device)
    if kept.exists():
        network.load_state_dict(load_file(kept))
        return network.eval()
    if not path.exists():
        terms_of_training = {"steps": task.pretrain, "batch_size": task.batch, "lr": task.pretrain_rate}
        settings = BASE | {f"train.{key}": value for key, value in terms_of_training.items()}
        trainer = trainer_of(task, settings, network, 10_000 + seed, device)
        trainer.fit_(network, None, "")
        _keep(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True, map_location=device))
    return network.eval()


def _ready_made(task: Task, seed: int, path: Path) -> nn.Module:
    """A published network, which gets a head, and that takes as long as an arm."""
    if not path.exists():
        _keep(task.network(seed), path)
    found: nn.Module = torch.load(path, weights_only=False)  # the study's own file
    return found


def same_source(one: Result, other: Result) -> bool:
    """Whether two results come from the same network. A test loss differs by 1e-6 between machines."""
    return abs(float(one["source_test"]["loss"]) - float(other["source_test"]["loss"])) < 1e-4


def other_source(run: Run, results: Results, device: torch.device) -> str:
    """Why the run can be no pair of the results of its task and seed: they come from another source. Else empty."""
    ours = {"source_test": _source_test(run.task, run.seed, device)}
    key = {"task": run.task.name, "terms": run.task.said, "seed": run.seed}
    theirs = [line for line in results.lines if all(line[name] == value for name, value in key.items())]
    if all(same_source(ours, line) for line in theirs):
        return ""
    return (
        f"{run.task.name}, seed {run.seed}: left out. This machine has trained another source than the one its "
        "results come from, and arms from two sources are no pairs. Take other seeds, or remove the results of this one"
    )


def _keep(what: object, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".part{os.getpid()}")
    torch.save(what, unfinished)
    unfinished.replace(path)


def trainer_of(task: Task, settings: dict[str, Any], source: nn.Module, seed: int, device: torch.device) -> Trainer:
    policy = load_policy(overrides=in_policys_words(settings)).policy
    train, held_out, _ = task.examples()
    return Trainer.of(policy, Data(train, held_out, ()), source, seed, device, Silent(), None)


def run_one(run: Run, device: torch.device) -> Result:
    task = run.task
    source = source_of(task, run.seed, device)
    terms = {"train.steps": task.steps, "train.batch_size": task.batch, "train.lr": run.rate}
    trainer = trainer_of(task, {**BASE, **run.settings, **terms}, source, run.seed, device)
    model = copy.deepcopy(source)
    plan, partitioner = (None, None) if run.arm.kind == "static" else _dynamic_(model, run, trainer)
    start = time.process_time()
    _fit_(model, partitioner, trainer, run.arm)
    took = (time.process_time() - start) / task.steps
    model = padconvert.fold(model)
    _, held_out, test = task.examples()
    uses = [] if plan is None else router_use(model, held_out, task.evaluated, device)
    return {
        "held_out": evaluate(model, held_out, task.evaluated, device=device),
        "test": evaluate(model, test, task.evaluated, device=device),
        "train": evaluate(model, _without_augmentation(task), task.evaluated, device=device),
        "source_test": _source_test(task, run.seed, device),
        **_sizes(plan, model),
        "step_cpu_seconds": round(took, 5),
        "router_entropy": [round(use.routing_entropy, 3) for use in uses],
        "torch": torch.__version__.partition("+")[0], "device": device.type, "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def _source_test(task: Task, seed: int, device: torch.device) -> dict[str, float]:
    """What the source itself reaches, which all its arms have in common."""
    return evaluate(source_of(task, seed, device), task.examples()[2], task.evaluated, device=device)


def _fit_(model: nn.Module, partitioner: Partitioner | None, trainer: Trainer, arm: Arm) -> None:
    """As `Trainer.fit_`, with the arm's trials."""
    training = start(model, partitioner, trainer.setting)
    keeper = trials.Averaged() if arm.trial("average") is not None else None
    finetune_(training, trainer.setting, Silent(), keeper)
    if keeper is not None:
        keeper.finish_(model)


def _dynamic_(model: nn.Module, run: Run, trainer: Trainer) -> tuple[Plan, Partitioner | None]:
    sample = trainer.data.train.batch(torch.arange(2)).to(trainer.setting.device, torch.float32).inputs
    plan = padconvert.plan(model, trainer.policy, inputs=sample, seed=run.seed)
    padconvert.rewrite_(model, plan)
    reads, grouping, noise = (run.arm.trial(name) for name in ("reads", "grouping", "noise"))
    if reads is not None:
        trials.READERS[str(reads)](model)
    if noise is not None:
        trials.add_noise_(model, float(noise), run.seed)
    if grouping is None:
        trainer.set_routers_(model, pad_layers(model))
    else:
        set_aligned_(model, trainer, str(grouping))
    if run.arm.trial("standards") is not None:
        trials.let_standards_follow(model)
    new_value = run.arm.trial("new_value")
    made = Partitioner if new_value is None else trials.NEW_VALUES[str(new_value)]
    return plan, made(model, plan) if run.arm.kind == "pad" else None


def _without_augmentation(task: Task) -> Prepared:
    """Some of the training examples as the test sees its own: what an arm has learned of them, beside what it has
    learned from them."""
    train, held_out, _ = task.examples()
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: TRAINED_BATCHES * task.evaluated]
    some = Subset(train.raw, drawn.sort().values)
    return Prepared(some, held_out.preparation, train.metrics)


def _sizes(plan: Plan | None, model: nn.Module) -> Result:
    # as torch counts them, without running statistics, for every arm
    parameters = sum(p.numel() for p in model.parameters())
    if plan is None:
        return {"parameters": parameters}
    totals = planned_totals(plan, 0)
    # an idea's routers may be larger than the plan's
    routers = [layer.router for layer in pad_layers(model).values() if layer.router is not None]
    router_bytes = ROUTER_BYTES * sum(p.numel() for router in routers for p in router.parameters())
    return {
        "parameters": parameters,
        "converted_bytes": plan.cost.bytes_values + plan.cost.bytes_masks + router_bytes,
        "macs": totals.macs_source,
        "macs_more": _more_macs(plan, model),
    }


def _more_macs(plan: Plan, model: nn.Module) -> int:
    """Multiply-adds a sample beside the static network's: the routers' and the mixing's; of a layer with top-k, which
    mixes nothing, those of each chosen expert after the first."""
    infos = {layer.info.name: layer.info for layer in plan.layers}
    more = 0
    for name, layer in pad_layers(model).items():
        macs = infos[name].macs or 0
        positions = macs // math.prod(layer.weight_shape) if layer.top_k else 1
        more += positions * sum(p.numel() for p in layer.router.parameters()) if layer.router is not None else 0
        if layer.top_k:
            share = layer.count_dynamic("weight") / layer.view("weight").units
            more += round(macs * share * (layer.top_k - 1))
        elif layer.weight_dynamic is not None:
            more += layer.weight_dynamic.numel()
    return more


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--task", action="append", default=[], choices=list(TASKS), metavar="NAME", help="; ".join(TASKS)
    )
    titles = [each.title for each in EXPERIMENTS]
    parser.add_argument(
        "--experiment", action="append", default=[], choices=titles, metavar="TITLE", help="; ".join(titles)
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    results, device = Results(RESULTS), torch.device(given.device)
    asked = (
        [each for each in EXPERIMENTS if each.title in given.experiment]
        if given.experiment
        else [each for each in EXPERIMENTS if device.type != "cpu" or not each.needs_gpu]
    )
    todo = (run for run in missing(asked, results, given.task) if results.of(run) is None)
    try:
        return run_all(todo, results, device, 60 * given.minutes)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def run_all(todo: Iterator[Run], results: Results, device: torch.device, seconds: float) -> int:
    """How many seconds it may take before a run is begun. What cannot be paired is left out, and said once."""
    begun, left_out, done = time.monotonic(), set[str](), 0
    for run in todo:
        if time.monotonic() - begun > seconds:
            print("out of time; the same command goes on", file=sys.stderr)
            return 0
        why_not = other_source(run, results, device)
        if why_not:
            if why_not not in left_out:
                print(why_not, file=sys.stderr)
            left_out.add(why_not)
            continue
        result = run_one(run, device)
        results.add(run, result)
        done += 1
        scores = f"{result['held_out'][run.task.metric]:.4f} held out, {result['test'][run.task.metric]:.4f} test"
        print(f"{run.task.name} · {run.arm.name} · seed {run.seed} · rate {run.rate}: {scores}", flush=True)
    if not done:
        print("nothing left to run", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
