"""One self-contained HTML file: no script, no font, no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from padconvert.gates import said as gate_said
from padconvert.report import numbers, terminal
from padconvert.report.charts import charts
from padconvert.report.layers_table import experts_said, has_units
from padconvert.report.plain import plain
from padconvert.report.routers import legend, mark
from padconvert.report.rows import Row, layer_rows
from padconvert.results import Conversion, LayerResult, Metrics, RouterUse
from padconvert.words import Verdict

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; }
td:first-child, th:first-child, td.text { text-align: left; } th { border-bottom: 1px solid #cbd2d9; }
tr.convert td.text { color: #2e7d32; } tr.ineligible td.text { color: #b0682c; }
.share { background: #e4e7eb; width: 8rem; height: .7rem; } .share div { background: #2e7d32; height: 100%; }
.use { display: flex; align-items: flex-end; gap: 1px; height: 1.1rem; }
.use i { background: #2e7d32; width: .5rem; min-height: 1px; }
.warning { color: #b0682c; } .passed { color: #2e7d32; } .failed { color: #c62828; } .small { color: #7b8794; }
svg { max-width: 100%; height: auto; display: block; }
"""


def page(result: Conversion) -> str:
    """The report of a conversion as an HTML document. Without matplotlib it has no charts, and says so."""
    result = plain(result)
    body = [_head(result), _cost(result), _charts(result), _receipts(result)]
    body += [_routers(result.routers)] if result.routers else []
    body.append(_layers(result.layers))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>padconvert: {escape(result.source.path)}'
        f"</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _head(result: Conversion) -> str:
    target = escape(result.output.path if result.output else terminal.planned(result))
    lines = [f"<h1>{escape(result.source.path)} → {target}</h1>"]
    lines.append(f'<p class="small">{result.route} route, seed {result.seed}, source sha256 {result.source.sha256}</p>')
    if result.route == "data-free":
        lines.append('<p class="warning">Nothing was trained: accuracy is that of the source until fine-tuned.</p>')
    lines += [f'<p class="warning">{escape(warning)}</p>' for warning in result.warnings]
    return "\n".join(lines)


def _cost(result: Conversion) -> str:
    metrics = result.metrics
    rows: list[list[str]] = []
    for name in metrics.output if metrics else ():
        assert metrics is not None
        if result.source.kind == "artefact":  # no static network was measured
            rows.append([escape(name), "–", "–", _cell(name, metrics.output), "–"])
            rows.append(["before this run", "–", "–", _cell(name, metrics.source), "–"])
            continue
        columns = (metrics.source, metrics.static, metrics.output, metrics.fully_dynamic)
        rows.append([escape(name), *[_cell(name, of) for of in columns]])
    for label, (source, *others), said in terminal.conversion_rows(result):
        cells = [_cost_cell(of, source, said) for of in (source, source, *others)]
        rows.append([label, *cells])
    header = ["", "static source", "static, same training", "padconvert", "fully dynamic"]
    if metrics is None or metrics.static is None:
        rows = [row[:2] + row[3:] for row in rows]
        header = header[:2] + header[3:]
    return "<h2>Cost beside both neighbours</h2>\n" + _table(header, (_row(row) for row in rows))


def _cost_cell(of: int | None, source: int | None, said: Callable[[int], str]) -> str:
    if of is None:
        return "–"
    return said(of) if source is None else f"{said(of)} ({numbers.times(of, source)})"


def _cell(name: str, of: Metrics | None) -> str:
    return numbers.metric(name, of[name]) if of is not None and name in of else "–"


def _charts(result: Conversion) -> str:
    try:
        return "\n".join(charts(result))
    except ImportError:
        return '<p class="small">No charts: matplotlib is not installed (pip install "padconvert[report]").</p>'


def _receipts(result: Conversion) -> str:
    lines = []
    if result.equality is not None:
        equality = result.equality
        word = "passed" if equality.passed else "failed"
        by_forward = equality.method == "forward"
        what = "Same function" if by_forward else "Same weights"
        why = "" if by_forward else f" No forward was compared: {equality.why}."
        lines.append(
            f'<p class="{word if by_forward or not equality.passed else "small"}">{what} before training '
            f"({escape(equality.method)}): {word}, relative difference {equality.max_rel_diff:.1e}, limit "
            f"{equality.tolerance:.0e}.{escape(why)}</p>"
        )
    if result.metrics is not None and result.metrics.verdict:
        lines.append(f"<p><strong>{escape(result.metrics.verdict)}</strong></p>")
    if result.metrics is not None and (about := terminal.verdict_about(result.metrics)):
        lines.append(f'<p class="small">{escape(about)}</p>')
    for gate in result.gates:
        word = "passed" if gate.passed else "failed"
        lines.append(f'<p class="{word}">Bound, {word}: {escape(gate_said(gate))}.</p>')
    lines += [f'<p class="small">{escape(note)}</p>' for note in result.notes]
    return "\n".join(lines)


def _routers(uses: Sequence[RouterUse]) -> str:
    header = ["router of", "use of experts", "least", "most", "entropy of use", "of routing", ""]
    return f'<h2>Routers</h2>\n<p class="small">{escape(legend())}.</p>\n' + _table(
        header, (_router(use) for use in uses)
    )


def _router(use: RouterUse) -> str:
    top = max(use.usage, default=0.0) or 1.0
    bars = "".join(
        f'<i style="height: {100 * share / top:.1f}%" title="expert {k}: {numbers.share(share)}"></i>'
        for k, share in enumerate(use.usage, 1)
    )
    shares = [numbers.share(share) for share in (min(use.usage), max(use.usage))]
    entropies = [f"{entropy:.2f}" for entropy in (use.usage_entropy, use.routing_entropy)]
    marked = f'<span class="warning">{mark(use)}</span>'
    return _row([escape(use.layer), f'<div class="use">{bars}</div>', *shares, *entropies, marked])


def _layers(layers: Sequence[LayerResult]) -> str:
    units = has_units(layers)
    header = ["layer", "weight", "verdict", "reason", *(["unit"] if units else []), "κ", "K", "static", "dynamic", ""]
    return "<h2>Layers</h2>\n" + _table(header, (_layer(row, units) for row in layer_rows(layers)))


def _layer(row: Row, units: bool) -> str:
    layer = row.layer
    names = row.branch + " = ".join((row.name, *layer.aliases)) + (f" ×{row.count}" if row.count > 1 else "")
    weight = f"{layer.type or layer.kind} {numbers.shape(layer.weight_shape)}"
    text = [names, weight, layer.verdict.value, layer.reason.value, *([layer.granularity or ""] if units else [])]
    cells = "".join(f'<td class="text">{escape(cell)}</td>' for cell in text)
    if layer.verdict is Verdict.CONVERT and layer.n_static is not None and layer.n_dynamic is not None:
        filled = 100 * layer.n_dynamic / max(layer.n_static + layer.n_dynamic, 1)
        ratio = "" if layer.dynamic_ratio is None else f"{layer.dynamic_ratio:.3g}"
        counts = (ratio, experts_said(layer), f"{layer.n_static:,}", f"{layer.n_dynamic:,}")
        cells += "".join(f"<td>{cell}</td>" for cell in counts)
        cells += f'<td><div class="share"><div style="width: {filled:.1f}%"></div></div></td>'
    return f'<tr class="{layer.verdict.value}" title="{escape(layer.reason.explanation)}">{cells}</tr>'


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(header: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
