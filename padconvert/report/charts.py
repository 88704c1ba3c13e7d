"""The charts of the HTML report, drawn by matplotlib (extra `report`) as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from padconvert.report import numbers
from padconvert.results import Conversion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#9aa5b1", "#607d8b", "#2e7d32", "#b0682c")  # source, control, padconvert, fully dynamic


def charts(result: Conversion) -> list[str]:
    """SVG elements: sizes beside both neighbours, the first metric beside them, the course of the loss.

    Raises ImportError where matplotlib is not installed.
    """
    drawn = [_sizes(result)]
    if result.metrics is not None and result.metrics.output:
        drawn.append(_metric(result))
    losses = [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry and "step" in entry]
    if len(losses) > 1:
        drawn.append(_course(losses, [entry["step"] for entry in result.history if "ratio" in entry]))
    return drawn


def _sizes(result: Conversion) -> str:
    totals = result.totals
    figure, axes = _figure("tensor bytes")
    values = (totals.tensor_bytes_source, totals.tensor_bytes_output, totals.tensor_bytes_fully_dynamic)
    names = ("static source", "padconvert", "fully dynamic")
    _bars(axes, names, values, [numbers.size(value) for value in values], (COLOURS[0], *COLOURS[2:]))
    axes.set_xlim(0, max(values) * 1.2)
    return _svg(figure)


def _metric(result: Conversion) -> str:
    metrics = result.metrics
    assert metrics is not None
    name = min(metrics.output, key=lambda name: name == "loss")  # the loss has a chart of its own
    every = {
        "before this run" if result.source.kind == "artefact" else "static source": metrics.source,
        "static, same training": metrics.static,
        "padconvert": metrics.output,
        "fully dynamic": metrics.fully_dynamic,
    }
    known = [
        (label, of[name], colour) for (label, of), colour in zip(every.items(), COLOURS, strict=True) if of is not None
    ]
    labels, values, colours = zip(*known, strict=True)
    figure, axes = _figure(name)
    _bars(axes, labels, values, [numbers.metric(name, value) for value in values], colours)
    # From zero: a cut axis makes small differences look large. Correlations may lie below it.
    axes.set_xlim(min(min(values) * 1.2, 0.0), max(max(values) * 1.2, 1e-12))
    return _svg(figure)


def _course(losses: Sequence[tuple[float, float]], rounds: Sequence[float]) -> str:
    figure, axes = _figure("loss; dotted lines are rounds of the partition")
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color=COLOURS[2], linewidth=1.2)
    for step in rounds:
        axes.axvline(step, color=COLOURS[0], linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    return _svg(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], said: Sequence[str], colours: Sequence[str]
) -> None:
    drawn = axes.barh(range(len(names)), values, color=colours, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.bar_label(drawn, said, padding=4, fontsize=9)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _svg(figure: Figure) -> str:
    """The figure as one <svg> element, the same text for the same figure."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "padconvert", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
