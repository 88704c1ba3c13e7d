"""docs/benchmarks.md and its chart, of what the tables left in `results/`. With --quick the tables alone, printed."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.bounds import Held, held, over
from benchmarks.rows import RESULTS, ROOT, Row

TABLES = ("networks", "convolutions", "finetune_step", "experts", "conversion", "startup")
DOCUMENT, CHART = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
#: what a person says of the bounds that are missed
MISSED = Path(__file__).with_name("missed.md")
COLOURS = {"static": "#9aa5b1", "channel": "#2e7d32", "element": "#607d8b", "paper": "#b0682c"}

_INTRODUCTION = """# Benchmarks

How long a converted layer, network, training step or command takes, beside what it has to be held against. `make bench`
takes every number below and writes this page (about an hour; interrupted, it goes on where it stopped); `make bench
QUICK=1` takes a few rows in some minutes and prints them.

* Every number is a **ratio inside one run**: the contenders are called in turn, A, B, C, A, B, C …, on the same inputs
  and a fixed number of threads, after a warm-up; the ratio is taken round by round, and given as its median. Seconds
  are of this machine and this day, and compare with nothing else.
* **static** is the network as it was before. **channel** and **element** are converted with K = 4 experts and κ = 0.3;
  their experts are moved apart first, so that nothing gains by their being equal. **paper** is the paper's own form,
  rebuilt from its equations (`tests/benchmarks/paper.py`): dense masks over all kernels multiplied in every call, all
  kernels summed to one weight a sample, one grouped convolution with a group for every sample. It computes the same
  values, which a test holds.
* On a GPU the tables of layers, networks, the step and experts are taken by `python -m benchmarks.networks --device
  cuda --dtype bfloat16` and so on (`PYTHONPATH=tests`), and this page by `python -m benchmarks.report`.

## Your own artefact

    padconvert bench ARTEFACT --against SOURCE [--batch-size N]... [--threads N] [--layers] [--quick] [--json]

times the artefact, the source that it was made from (its sha256 is checked), and the fully dynamic network: the same
plan with κ = 1, built from the artefact. Inputs are those that the artefact was probed with when it was made;
`--input-shape 1,3,224,224` or `--data` name others. Each convolution first measures which path is its fastest there.
`--layers` lists every converted layer at its place in the running network, with the path that it took. A Ctrl-C shows
what was measured until then (exit code 130). With `--json`, schema `padconvert.bench/1`: `machine`, `dtype`, `inputs`;
`batches` of `batch_size`, `rounds`, and for `static`, `output` and `fully_dynamic` each `seconds` and `over_static`
(medians; `_low` and `_high` are quartiles) and `peak_bytes` (memory of one call above what was held before; null where
the system does not say); `layers`; `bytes_…` of each network's tensors; `notes`; `complete`.
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """What each table left, by file name without its ending: `networks`, `networks-cuda-bfloat16` …"""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def document(results: dict[str, dict[str, Any]], *, bounds: bool = True) -> str:
    """The whole page. Quick numbers are of other sizes than the `bounds` are for."""
    rows: dict[str, dict[str, Row]] = {name: result["rows"] for name, result in results.items()}
    missed = [_bounds(held(rows)), MISSED.read_text(encoding="utf-8")] if bounds else []
    parts = [_INTRODUCTION, *missed, *_sections(rows)]
    kinds = sorted({name.partition("-")[2] for name in results} - {""})
    for kind in kinds:
        there = {name.partition("-")[0]: found for name, found in rows.items() if name.endswith(f"-{kind}")}
        parts += [f"## On {kind.replace('-', ', ')}\n", *(part.replace("## ", "### ", 1) for part in _sections(there))]
    return "\n".join([*parts, _machines(results)])


def _bounds(every: Sequence[Held]) -> str:
    lines = ["## What is aimed for\n", "| what | at most | measured | |", "|---|--:|--:|---|"]
    for each in every:
        found = "not taken" if each.measured is None else f"{each.measured:.4g}{each.unit}"
        verdict = {None: "", True: "met", False: "**missed**"}[each.met]
        lines.append(f"| {each.what} | {each.at_most:.4g}{each.unit} | {found} | {verdict} |")
    taken = [each for each in every if each.measured is not None]
    met = sum(bool(each.met) for each in taken)
    said = f"{met} of {len(taken)} that were taken are met" + (
        "." if len(taken) == len(every) else f", of {len(every)}."
    )
    return "\n".join([*lines, "", said, ""])


def _sections(rows: Mapping[str, dict[str, Row]]) -> Iterator[str]:
    for name, section in (
        ("networks", _networks), ("convolutions", _convolutions), ("finetune_step", _step), ("experts", _experts),
        ("conversion", _conversion), ("startup", _startup),
    ):  # fmt: skip
        if rows.get(name):
            yield "\n".join([*section(rows[name]), ""])


def _ratio(row: Row, name: str, base: str = "static") -> str:
    """Median and quartiles, where both were timed."""
    found = row["over"].get(base, {}).get(name)
    return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"


def _networks(rows: dict[str, Row]) -> Iterator[str]:
    pixels = next(iter(rows.values()))["pixels"]
    yield f"## Whole networks, {pixels} px\n"
    yield f"![time over the static network]({CHART.name})\n"
    yield "| network | static ms | channel over static | element over static | paper over static | element over paper |"
    yield "|---|--:|--:|--:|--:|--:|"
    for key, row in rows.items():
        ours = " | ".join(_ratio(row, name) for name in ("channel", "element", "paper"))
        yield f"| {key} | {1000 * row['seconds']['static'][0]:.1f} | {ours} | {_ratio(row, 'element', 'paper')} |"


def _convolutions(rows: dict[str, Row]) -> Iterator[str]:
    batches = sorted({row["batch"] for row in rows.values()})
    yield "## Convolutions of ResNet-18 and ResNet-50, one by one\n"
    yield "Over the static layer; each cell is channel / element / paper.\n"
    yield f"| convolution | {' | '.join(f'B {batch}' for batch in batches)} |"
    yield "|---|" + "--:|" * len(batches)
    shapes: dict[str, dict[int, Row]] = {}
    for key, row in rows.items():
        shapes.setdefault(key.rpartition(", B ")[0], {})[row["batch"]] = row
    for shape, of in shapes.items():
        yield f"| {shape} | {' | '.join(_cell(of.get(batch)) for batch in batches)} |"
    means = [[row for row in rows.values() if row["batch"] == batch] for batch in batches]
    yield f"| **geometric mean** | {' | '.join(map(_mean_cell, means))} |"


def _cell(row: Row | None) -> str:
    return (
        ""
        if row is None
        else " / ".join(f"{over(row, name, 'static'):.2f}" for name in ("channel", "element", "paper"))
    )


def _mean_cell(rows: Sequence[Row]) -> str:
    names = ("channel", "element", "paper")
    return " / ".join(f"{geometric_mean([over(row, name, 'static') for row in rows]):.2f}" for name in names)


def _step(rows: dict[str, Row]) -> Iterator[str]:
    names = ("fully dynamic", "channel", "element", "paper")
    yield "## A fine-tune step of the CIFAR ResNet-20\n"
    yield "Forward, backward and SGD, over the static network's step.\n"
    yield f"| batch | static ms | {' | '.join(names)} |"
    yield "|---|--:|" + "--:|" * len(names)
    for row in rows.values():
        ratios = " | ".join(_ratio(row, name) for name in names)
        yield f"| {row['batch']} | {1000 * row['seconds']['static'][0]:.1f} | {ratios} |"


def _experts(rows: dict[str, Row]) -> Iterator[str]:
    theirs = sorted({base for row in rows.values() for base in row["over"] if base.startswith("mixtral")})
    yield "## Feed-forward blocks as mixtures of experts\n"
    yield "d 384, h 1536, E = 8, top-2, `neuron` with κ = 0.5. transformers' block is Mixtral's, gated as the second"
    yield "of ours is, with the same shapes; by its implementation.\n"
    beside = " | ".join(f"gated, over {each}" for each in theirs)
    yield f"| tokens | neuron over dense | gated, over dense gated | {beside} |"
    yield "|---|--:|--:|" + "--:|" * len(theirs)
    for row in rows.values():
        beside = " | ".join(_ratio(row, "neuron gated", each) for each in theirs)
        ours = f"{_ratio(row, 'neuron', 'dense')} | {_ratio(row, 'neuron gated', 'dense gated')}"
        yield f"| {row['tokens']} | {ours} | {beside} |"


def _conversion(rows: dict[str, Row]) -> Iterator[str]:
    yield "## Data-free conversion of a state dict\n"
    yield "Over reading the source, writing as many bytes as the output has, sha256 of both, and fsync.\n"
    yield "| granularity | source MB | output MB | copying s | convert s | over copying | peak anonymous MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in (row for row in rows.values() if "granularity" in row):
        megabytes = [f"{row[key] / 1e6:.0f}" for key in ("bytes_source", "bytes_output")]
        seconds = [f"{row['seconds'][name][0]:.2f}" for name in ("copying", "convert")]
        cells = [row["granularity"], *megabytes, *seconds, _ratio(row, "convert", "copying")]
        yield f"| {' | '.join(cells)} | {row['peak_anonymous_bytes'] / 1e6:.0f} |"
    for row in (row for row in rows.values() if "bytes_needed" in row):
        yield (
            f"\nThe checkpoint of a ResNet-50 with unequal experts, `element`, has {row['bytes']:,} bytes, "
            f"{row['bytes_router']:,} of them routers; the others are {row['bytes_over_needed']:.5f} times the bytes "
            "of its values and mask bits."
        )


def _startup(rows: dict[str, Row]) -> Iterator[str]:
    yield "## Starting up\n"
    yield "| command | seconds | more than `python -c pass` |"
    yield "|---|--:|--:|"
    for row in rows.values():
        for name, seconds in row["seconds"].items():
            more = f"{row['more'][name][0]:.2f}" if name in row["more"] else ""
            yield f"| {name} | {seconds[0]:.2f} | {more} |"
        yield f"\n`inspect` is of a safetensors file of {row['bytes'] / 1e6:.0f} MB."


def _machines(results: dict[str, dict[str, Any]]) -> str:
    lines = ["## Machine and commands\n"]
    for name, result in results.items():
        at = result["machine"]
        machine = (
            f"{at['device']}, {at['cores']} cores ({at['vectors']}), {at['threads']} thread{'s' * (at['threads'] != 1)}"
        )
        lines.append(f"* {name}: `{result['command']}`; {machine}, torch {at['torch']}, Python {at['python']}")
    return "\n".join([*lines, ""])


def chart(rows: dict[str, Row]) -> str:
    """SVG: each network's time over the static one's, a group of bars for every network and batch size."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = ("channel", "element", "paper")
    for place, name in enumerate(names):
        ratios = [row["over"]["static"].get(name, [0.0])[0] for row in rows.values()]
        drawn = axes.barh(
            [i + 0.27 * (place - 1) for i in range(len(rows))], ratios, 0.25, color=COLOURS[name], label=name
        )
        axes.bar_label(drawn, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color=COLOURS["static"], linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("time over the static network (line: 1)")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "padconvert", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    results = load(given.results / "quick" if given.quick else given.results)
    if not results:
        print(f"{given.results}: holds no results; 'make bench' takes them", file=sys.stderr)
        return 1
    text = document(results, bounds=not given.quick)
    if given.quick:
        print(text)
        return 0
    DOCUMENT.write_text(text, encoding="utf-8")
    if "networks" in results:
        CHART.write_text(chart(results["networks"]["rows"]), encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
