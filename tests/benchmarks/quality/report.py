"""docs/results.md, of what the study left in `results/`: `PYTHONPATH=tests python -m benchmarks.quality.report`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality import aims
from benchmarks.quality.arms import (
    DYNAMIC,
    DYNAMIC_FAST,
    DYNAMIC_LESS_SURE_FAST,
    LESS_SURE,
    LESS_SURE_FAST,
    PAD,
    PAD_FAST,
    RANDOM,
    RANDOM_LESS_SURE_FAST,
    STATIC,
    Arm,
)
from benchmarks.quality.experiments import EVERY, EXPERIMENTS, Experiment
from benchmarks.quality.intervals import Interval, by_seed, difference, on_test, runs_of
from benchmarks.quality.kinds import FILE as KINDS
from benchmarks.quality.study import RESULTS, Result, Results
from benchmarks.quality.tasks import TASKS, Task

AIMS_GO_HERE = "<!-- the table of aims -->"
KINDS_GO_HERE = "<!-- the table of kinds -->"
_LONG = "Finished sources, long"
CHARTED = (_LONG, f"{_LONG}, experts faster", f"{_LONG}, experts faster, other seeds", "Texts")
GAINS: Mapping[str, tuple[Arm, Arm]] = {
    "PAD over static": (LESS_SURE, STATIC),
    "× 4: PAD over static": (LESS_SURE_FAST, STATIC),
    "× 4: fully dynamic over static": (DYNAMIC_LESS_SURE_FAST, STATIC),
    "× 4: PAD over random": (LESS_SURE_FAST, RANDOM_LESS_SURE_FAST),
    "PAD at × 4 over × 1": (LESS_SURE_FAST, LESS_SURE),
    "surer: PAD over static": (PAD, STATIC),
    "surer: fully dynamic over static": (DYNAMIC, STATIC),
    "surer: PAD over random": (PAD, RANDOM),
    "surer, × 4: PAD over static": (PAD_FAST, STATIC),
    "surer, × 4: fully dynamic over static": (DYNAMIC_FAST, STATIC),
}
#: README.md has these; a test holds them against the results
GAINS_IN_README = {
    "PAD": (LESS_SURE, STATIC),
    "PAD at × 4": (LESS_SURE_FAST, STATIC),
    "fully dynamic at × 4": (DYNAMIC_LESS_SURE_FAST, STATIC),
}
FEWEST_LINES = 5  # of a section with no runs in it: only its head
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "results.md"
CHART = DOCUMENT.with_suffix(".svg")


def table(results: Results, experiment: Experiment, task: Task) -> Iterator[str]:
    """One task's arms, one line each."""
    every = {arm.name: runs_of(results, task, arm, experiment.seeds, experiment.rate) for arm in experiment.arms}
    static, dynamic = (_first(every, experiment, kind) for kind in ("static", "dynamic"))
    source = [run["source_test"][task.metric] for run in static.values()]
    yield f"### {task.name}\n"
    yield (
        f"The source, trained {task.pretrain:,} steps, has {Interval.of(source).said()} %; "
        f"then {task.steps:,} steps of {task.batch} for every arm.{_kinds(task)}\n"
        if source
        else ""
    )
    columns = (
        "seeds", "rate", f"{task.metric} %", "loss", "on training data", "over static", "over fully dynamic",
        "parameters", "bytes", "multiply-adds", "time",
    )  # fmt: skip
    yield f"| arm | {' | '.join(columns)} |"
    yield f"|---|{'--:|' * len(columns)}"
    for arm in experiment.arms:
        runs = every[arm.name]
        if runs:
            yield _line(task, arm, runs, static, dynamic)
    yield ""


def _first(every: Mapping[str, dict[int, Result]], experiment: Experiment, kind: str) -> dict[int, Result]:
    """The runs that the others are held against: of the first arm of the kind that has any."""
    return next((runs for arm in experiment.arms if arm.kind == kind and (runs := every[arm.name])), {})


def _kinds(task: Task) -> str:
    found = _separation(task)
    return "" if found is None else f" Its layers' inputs fall apart by {found:.2f} in the mean."


def _separation(task: Task) -> float | None:
    """How far the inputs of its layers fall into kinds, where that was taken."""
    known = json.loads(KINDS.read_text(encoding="utf-8")) if KINDS.exists() else {}
    found = known.get(task.name) or known.get(task.family)
    return max(fmean(found), 0.0) if found else None


def kinds_table(results: Results, columns: Mapping[str, tuple[Arm, Arm]]) -> Iterator[str]:
    """What the tasks of the first experiment gained, those first whose inputs fall apart furthest."""
    yield f"| task | inputs fall apart by | {' | '.join(columns)} |"
    yield f"|---|--:|{'--:|' * len(columns)}"
    tasks = [TASKS[name] for name in EXPERIMENTS[0].tasks]
    found = [(apart, task) for task in tasks if (apart := _separation(task)) is not None]
    for apart, task in sorted(found, key=lambda each: -each[0]):
        gains = [list(by_seed(results, task, *pair, EVERY).values()) for pair in columns.values()]
        said = [Interval.of(each).said(sign=True) if each else "" for each in gains]
        yield f"| {task.name.partition(' (')[0]} | {apart:.2f} | {' | '.join(said)} |"


def _line(task: Task, arm: Arm, runs: dict[int, Result], static: dict[int, Result], dynamic: dict[int, Result]) -> str:
    one = next(iter(runs.values()))
    over = [difference(runs, other, task.metric) if runs is not other else None for other in (static, dynamic)]
    full = next(iter(dynamic.values()), {}).get("converted_bytes")
    share = f"{one['converted_bytes'] / full:.2f}" if full and "converted_bytes" in one else ""
    time = _time(runs) / _time(static) if static else 0.0
    macs = f"{1 + one['macs_more'] / one['macs']:.3f}" if "macs_more" in one else ""
    cells = [
        arm.name, str(len(runs)), f"{one['rate']:g}", on_test(runs, task.metric).said(),
        f"{fmean(run['test']['loss'] for run in runs.values()):.4f}", _learned(runs, task.metric),
        *("" if each is None else each.said(sign=True) for each in over),
        f"{one['parameters']:,}", share, macs, f"{time:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _learned(runs: dict[int, Result], metric: str) -> str:
    """What the arm scores on what it was trained on; the first runs did not look."""
    found = [run["train"][metric] for run in runs.values() if "train" in run]
    return f"{100 * fmean(found):.1f}" if found else ""


def _time(runs: dict[int, Result]) -> float:
    return fmean(run["step_cpu_seconds"] for run in runs.values())


_HEAD = """# Results

Does a conversion pay? Every arm starts from the same trained network and trains for the same steps on the same
batches with the same augmentation: the static network itself, the fully dynamic one, and partially dynamic ones (PAD,
κ = 0.3, K = 4, `element` unless said) whose dynamic entries are chosen by their score, or at random. All train by
AdamW, without distillation, unless said. The learning rate is one for all arms where a section says so; elsewhere
each arm's is chosen from the same grid on held-out training data with the first seed. The test set chooses no rate;
ideas for the recipe were looked at on it, one seed each ([log](decisions/recipe.md)).

Routers start *less sure* of an expert (a mean top weight of 0.5, the default), or *surer* (0.8): arms are the latter
that do not say. *× 4*: dynamic entries learn four times as fast as static ones (`train.expert_lr_scale: 4`).

± is half a 95 % interval of Student's t over seeds, differences are pair by pair; *over fully dynamic* is over a
table's first fully dynamic arm. *Loss* is the cross-entropy on the test set, which moves less by chance than an
accuracy does. *On training data* is the same metric on some of the examples that were trained on. *Bytes* are those
of the converted layers over the fully dynamic network's, *multiply-adds* those of one sample over the static
network's, *time* the CPU time of a training step over the static network's, rounds of the partition included, and
says little: lines come from several machines and shared their cores with others. `make bench` times steps in turns
([benchmarks](benchmarks.md)). Tables are written by the study:

    make study       # runs what is missing, then writes this page; takes hours, goes on where it stopped

`PADCONVERT_DATA` names its folder of data: `cifar10/` (train_0, train_1 and test.npz), `fashion_mnist/` (the four IDX
files), `text/` (sst2, cola, mrpc and subj as .tsv) and `weights/resnet20-12fca82f.th`. Full sizes run with
`TASKS="--device cuda"`. A source that this machine trains otherwise than the one that results came from is left out,
and said.
"""


def document(results: Results, findings: str = "") -> str:
    """The whole page; `findings` is what a person says of it, kept in `findings.md` beside the list."""
    findings = findings.replace(AIMS_GO_HERE, "\n".join(aims.table(results)))
    parts = [_HEAD, findings.replace(KINDS_GO_HERE, "\n".join(kinds_table(results, GAINS)))]
    for experiment in EXPERIMENTS:
        sections = [list(table(results, experiment, TASKS[name])) for name in experiment.tasks]
        sections = [lines for lines in sections if len(lines) > FEWEST_LINES]
        if sections:
            parts.append(f"## {experiment.title}\n\n{experiment.says}\n")
            parts += ["\n".join(lines) for lines in sections]
    return "\n".join(parts)


def chart(results: Results, experiments: Sequence[Experiment]) -> str:
    """SVG: each arm's gain over the static network, task by task, with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for each in experiments for arm in each.arms if arm.kind != "static"))
    every = dict.fromkeys(name for each in experiments for name in each.tasks)
    names = [name for name in every if runs_of(results, TASKS[name], STATIC, EVERY)]
    figure = Figure(figsize=(8, 0.8 + 0.2 * len(arms) * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(arms):
        axes.plot([], [], "o", color=f"C{place}", label=arm.name)
        for row, name in enumerate(names):
            found = Interval.of(values) if (values := _gains(results, name, arm)) else None
            if found is not None:
                at = row + 0.8 * (place / len(arms) - 0.4)
                axes.errorbar(found.mean, at, xerr=found.half or 0, fmt="o", color=f"C{place}", capsize=2)
    axes.axvline(0, color="#9aa5b1", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("points over the static network after the same steps (bars: 95 %)")
    axes.legend(frameon=False, fontsize=8)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "padconvert", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _gains(results: Results, name: str, arm: Arm) -> list[float]:
    return list(by_seed(results, TASKS[name], arm, STATIC, EVERY).values())


def main() -> int:
    results, findings = Results(RESULTS), Path(__file__).with_name("findings.md")
    DOCUMENT.write_text(document(results, findings.read_text(encoding="utf-8")), encoding="utf-8")
    CHART.write_text(chart(results, [each for each in EXPERIMENTS if each.title in CHARTED]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
