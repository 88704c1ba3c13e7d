"""The table of layers that `inspect` and `convert` share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from padconvert.report import numbers
from padconvert.report.rows import Row, layer_rows
from padconvert.results import LayerResult
from padconvert.words import Reason, Verdict

STYLES = {Verdict.CONVERT: "green", Verdict.STATIC: "", Verdict.INELIGIBLE: "yellow"}
BAR_WIDTH = 8


def layers_table(layers: Sequence[LayerResult], *, limit: int | None = None) -> RenderableType:
    """Rows in module order as `layer_rows` makes them, then a line that counts the verdicts.

    With a `limit` and more rows than that, converted layers are shown first and the rest is counted.
    """
    rows = layer_rows(layers)
    shown = _most_telling(rows, limit)
    units = has_units(layers)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layer")
    for name in ("weight", "verdict"):
        table.add_column(name, no_wrap=True)
    if units:
        table.add_column("unit", no_wrap=True)
    for name in ("κ", "K", "static", "dynamic"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("share", no_wrap=True)
    kinds = any(layer.separation is not None for layer in layers)
    if kinds:
        table.add_column("kinds", justify="right", no_wrap=True)
    for row in shown:
        table.add_row(*_row(row, units), *([_kinds(row.layer)] if kinds else []))
    hidden = len(layers) - sum(row.count for row in shown)
    more = Text(f"… and {hidden} more layers: --json and --plan-out list all of them", style="dim") if hidden else None
    parts: list[RenderableType] = [table, *([more] if more else []), Text(_counts(layers), style="dim")]
    return Group(*parts)


def has_units(layers: Sequence[LayerResult]) -> bool:
    """Whether there are blocks, of which it has to be said what the unit of their partition is."""
    return any(layer.group for layer in layers)


def experts_said(layer: LayerResult) -> str:
    """K, or `2 of 8` where only some experts are computed."""
    return f"{layer.top_k} of {layer.num_experts}" if layer.top_k else str(layer.num_experts or "")


def _most_telling(rows: Sequence[Row], limit: int | None) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return list(rows)
    first = sorted(range(len(rows)), key=lambda i: (rows[i].layer.verdict is not Verdict.CONVERT, i))[:limit]
    return [rows[i] for i in sorted(first)]


def _row(row: Row, units: bool) -> list[RenderableType]:
    layer = row.layer
    name = Names(row.branch + (row.name or "(the model itself)"), layer.aliases)
    times = f" ×{row.count}" if row.count > 1 else ""
    verdict = Text(_verdict(layer) + times, style=STYLES[layer.verdict])
    weight = f"{layer.type or layer.kind} {numbers.shape(layer.weight_shape)}"
    ratio = "" if layer.dynamic_ratio is None else f"{layer.dynamic_ratio:.3g}"
    cells: list[RenderableType] = [name, weight, verdict]
    cells += [*([layer.granularity or ""] if units else []), ratio, experts_said(layer)]
    if layer.n_dynamic is None or layer.n_static is None:  # a plan whose layers are still to be ranked together
        return [*cells, "", "", ""]
    filled = Text(numbers.bar(layer.n_dynamic / (layer.n_static + layer.n_dynamic), BAR_WIDTH), style="cyan")
    return [*cells, f"{layer.n_static:,}", f"{layer.n_dynamic:,}", filled]


def _kinds(layer: LayerResult) -> str:
    """How far the layer's inputs fall into kinds; below 0 they do so by chance alone."""
    return "" if layer.separation is None else f"{max(layer.separation, 0):.2f}"


@dataclass(frozen=True, slots=True)
class Names:
    """A layer's name and its aliases. Where there is too little room for a name, its lines end in dots."""

    name: str
    aliases: tuple[str, ...]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        every = (self.name, *(f"= {alias}" for alias in self.aliases))
        least = max(len(piece) for name in every for piece in _pieces(name))
        return Measurement(min(least, options.max_width), min(max(map(len, every)), options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width
        yield Text("\n".join(_folded(self.name, width)), overflow="fold")
        for alias in self.aliases:
            yield Text("\n".join(_folded(f"= {alias}", width)), style="dim", overflow="fold")


def _pieces(name: str) -> list[str]:
    """`a.b.c` as `a.`, `b.`, `c`."""
    return re.findall(r"[^.]*\.|[^.]+$", name) or [name]


def _folded(name: str, width: int) -> list[str]:
    """The name in as few lines of this width as its dots allow."""
    lines = [""]
    for piece in _pieces(name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines


def _verdict(layer: LayerResult) -> str:
    """The word, or the reason code where that says more."""
    if layer.verdict is Verdict.CONVERT or layer.reason is Reason.POLICY_RULE:
        return layer.verdict.value
    return layer.reason.value


def _counts(layers: Sequence[LayerResult]) -> str:
    counted = Counter(layer.verdict for layer in layers)
    parts = []
    for verdict in filter(counted.get, Verdict):
        reasons = Counter(layer.reason for layer in layers if layer.verdict is verdict)
        said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        parts.append(f"{counted[verdict]} {verdict}" + (f" ({said})" if verdict is not Verdict.CONVERT else ""))
    return (
        f"{len(layers)} layer{'' if len(layers) == 1 else 's'}: " + " · ".join(parts)
        if layers
        else "no layer that padconvert knows"
    )
