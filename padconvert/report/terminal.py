"""Results on a terminal: what was done, what it costs beside both neighbours, and the receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from padconvert.gates import said as gate_said
from padconvert.report import bench, numbers
from padconvert.report.layers_table import layers_table
from padconvert.report.plain import plain
from padconvert.report.routers import legend, routers_table
from padconvert.results import (
    Audited,
    Bench,
    Check,
    Comparison,
    Conversion,
    Diagnosis,
    Equality,
    Extra,
    Holdings,
    Inspection,
    LayerResult,
    Metrics,
    Result,
    Totals,
    Verification,
)

#: label, (static source, padconvert, fully dynamic), and how a number is said
CostRow = tuple[str, tuple[int | None, int | None, int | None], Callable[[int], str]]

ROWS = 40  # of the layer table after a conversion
UNWRAPPED = 10_000  # columns off a terminal, where one line of ours is one line of text


def console() -> Console:
    """Where reports go: stdout, in colour on a terminal only (NO_COLOR is respected by rich)."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=UNWRAPPED)


def show(result: Result, target: Console | None = None) -> None:
    """Print the report of `result`."""
    target, result = target or console(), plain(result)
    match result:
        case Conversion():
            blocks = _conversion(result)
        case Inspection():
            blocks = _inspection(result)
        case Verification():
            blocks = _verification(result)
        case Audited():
            blocks = _audited(result)
        case Diagnosis():
            blocks = _diagnosis(result)
        case Bench():
            blocks = bench.blocks(result)
    for i, block in enumerate(blocks):
        if i:
            target.print()
        target.print(block)


# ---- convert


def _conversion(result: Conversion) -> Iterator[RenderableType]:
    yield _headline(result)
    yield layers_table(result.layers, limit=ROWS)
    yield cost_table(result)
    yield _parts(result.totals)
    if result.history:
        yield _lines(list(_course(result.history)))
    if result.routers:
        yield Group(routers_table(result.routers, limit=ROWS), Text(legend(), style="dim"))
    receipts = list(_receipts(result))
    if receipts:
        yield _lines(receipts)
    if result.warnings or result.notes:
        notes = [_note(note) for note in dict.fromkeys(result.notes)]
        yield _lines([Text(f"! {line}", style="yellow") for line in result.warnings] + notes)


def _headline(result: Conversion) -> Text:
    source = f"{result.source.path} ({result.source.kind}, {numbers.size(result.source.bytes)})"
    if result.output is None:
        line = Text(f"{source}: {planned(result)}", style="bold")
    else:
        line = Text(f"{source} → {result.output.path} ({numbers.size(result.output.bytes)})", style="bold")
    took = numbers.seconds(sum(result.timing.values())) if result.timing else ""
    line.append("\n" + " · ".join(filter(None, [f"{result.route} route", f"seed {result.seed}", took])), style="dim")
    if result.route == "data-free":
        line.append("\nNothing was trained: accuracy is that of the source until the artefact is fine-tuned", "yellow")
        line.append(" (padconvert convert ARTEFACT --data …).", style="yellow")
    return line


def planned(result: Conversion) -> str:
    """What a dry run left behind."""
    saved = f" (saved as {result.plan_file})" if result.plan_file else ""
    return f"the plan{saved}; no artefact was written"


def cost_table(result: Conversion) -> Table:
    """Metrics, parameters and bytes, each beside the static source and the fully dynamic network."""
    metrics = result.metrics
    control = metrics is not None and metrics.static is not None
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for name in ("static source", *(["static, same training"] if control else []), "padconvert", "fully dynamic"):
        table.add_column(name, justify="right", style="bold green" if name == "padconvert" else "", no_wrap=True)
    if metrics is not None:
        _metric_rows(table, metrics, control, result.source.kind)
    for label, (source, *rest), said in conversion_rows(result):
        _add_cost(table, label, [source, *([source] if control else []), *rest], said)
    return table


def chooses(layers: Sequence[LayerResult]) -> bool:
    """Whether a token is computed with fewer parameters than are stored: by some of the experts, or all in one."""
    return any(layer.top_k or layer.group for layer in layers)


def conversion_rows(result: Conversion) -> list[CostRow]:
    """`cost_rows` of a conversion. An artefact's file is not that of the static source that the numbers beside are of,
    and the weights of a directory are not all of it."""
    *rows, (label, (source, *others), said) = cost_rows(
        result.totals, written=result.output is not None, routed=chooses(result.layers)
    )
    if result.source.kind == "artefact":
        source = None
    label = "weight files" if result.source.kind == "transformers" else label
    return [*rows, (label, (source, others[0], others[1]), said)]


def cost_rows(totals: Totals | Holdings, *, written: bool = True, routed: bool = False) -> list[CostRow]:
    """Parameters, those of them that compute a token where layers are `routed` to experts, bytes of tensors and of
    whole files, of which a file that was not `written` has none."""
    full = totals.bytes_fully_dynamic
    files = (totals.bytes_source, *((totals.bytes_output, full) if written else (None, None)))
    tensors = (totals.tensor_bytes_source, totals.tensor_bytes_output, totals.tensor_bytes_fully_dynamic)
    params = (totals.params_source, totals.params_output, totals.params_fully_dynamic)
    active = (totals.params_active_source, totals.params_active_output, totals.params_active_fully_dynamic)
    rows: list[CostRow] = [("parameters", params, "{:,}".format)]
    if routed and active[0] is not None:
        rows.append(("active per token", active, "{:,}".format))
    return [*rows, ("tensor bytes", tensors, numbers.size), ("file", files, numbers.size)]


def _add_cost(table: Table, label: str, values: Sequence[int | None], said: Callable[[int], str]) -> None:
    """A row of numbers, and one of their ratios to the first."""
    table.add_row(label, *["–" if value is None else said(value) for value in values])
    base, *others = values
    if base is not None and any(value is not None for value in others):
        table.add_row("", *["" if value is None else numbers.times(value, base) for value in values])


def _metric_rows(table: Table, metrics: Comparison, control: bool, kind: str) -> None:
    for name in sorted(metrics.output, key=lambda name: name == "loss"):  # what one asks for first, the loss last

        def cell(of: Metrics | None, name: str = name) -> str:
            return numbers.metric(name, of[name]) if of and name in of else "–"

        controls = [cell(metrics.static)] if control else []
        if kind == "artefact":  # no static network was measured
            table.add_row(name, "–", *controls, cell(metrics.output), "–")
            table.add_row("  before this run", "", *controls, cell(metrics.source), "")
        else:
            table.add_row(name, cell(metrics.source), *controls, cell(metrics.output), cell(metrics.fully_dynamic))


def _parts(totals: Totals) -> Text:
    """What the bytes of the output are made of."""
    known = {
        "values": totals.bytes_values,
        "bitmasks": totals.bytes_masks,
        "routers": totals.bytes_router,
        "header": totals.bytes_header,
    }
    rest = totals.bytes_output - sum(known.values())
    parts = {**known, "untouched layers": rest} if rest > 0 else known
    line = Text("the file: ", style="dim")
    line.append(" · ".join(f"{name} {numbers.size(count)}" for name, count in parts.items() if count), style="dim")
    line.append(f"\n{numbers.share(totals.dynamic_ratio)} of the converted layers' weights are dynamic", style="dim")
    return line


def _course(history: Sequence[dict[str, float]]) -> Iterator[Text]:
    rounds = [entry["ratio"] for entry in history if "ratio" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        line = Text("loss       ", style="dim").append(numbers.sparkline(losses, 48), style="cyan")
        yield line.append(f"  {losses[0]:.4f} → {losses[-1]:.4f}", style="dim")
    if any(ratio < 1 for ratio in rounds):
        steps = " → ".join(f"{100 * ratio:.0f}" for ratio in (1.0, *rounds))
        yield Text(f"partition  {steps} % dynamic", style="dim")


def _receipts(result: Conversion) -> Iterator[Text]:
    if result.equality is not None:
        yield equality_line(result.equality)
    if result.metrics is not None and result.metrics.verdict:
        yield Text(result.metrics.verdict, style="bold")
    if result.metrics is not None and (about := verdict_about(result.metrics)):
        yield _note(about)
    for gate in result.gates:
        yield _check(gate.passed, f"bound {gate_said(gate)}")


def verdict_about(metrics: Comparison) -> str:
    """What the verdict does not say, where there are metrics that it is not about; "" where nothing was compared."""
    others = ", ".join(name for name in metrics.output if name not in ("loss", "accuracy"))
    if metrics.static is None or not others:
        return ""
    if not metrics.verdict:
        return f"no verdict: what is chance is estimated for accuracy only, not for {others}"
    return f"the verdict is about accuracy; what is chance in {others} is not estimated"


def equality_line(equality: Equality) -> Text:
    """The first promise, kept or broken, in one line."""
    limit = f"(limit {equality.tolerance:.0e})"
    if equality.method == "forward":
        what = f"max|Δ| = {equality.max_rel_diff:.1e} · max|y| on {equality.samples} samples"
        return _check(equality.passed, f"same function before training: {what} {limit}")
    what = f"max|ΣπD − W| = {equality.max_rel_diff:.1e} · max|W| {limit}"
    line = f"the same weights before training, by arithmetic: {what}; no forward was compared: {equality.why}"
    return _note(line) if equality.passed else _check(False, line)


# ---- inspect


def _inspection(result: Inspection) -> Iterator[RenderableType]:
    line = Text(f"{result.path}: {result.kind}, {numbers.size(result.bytes)}", style="bold")
    if result.trained is False:
        line.append("\nNot fine-tuned: its experts are still equal, so it computes what its source computes.", "yellow")
    yield line
    yield layers_table(result.layers)
    yield _holdings(result)
    if result.provenance:
        yield _lines([_note(f"{key}: {value}") for key, value in result.provenance.items()])
    if result.notes:
        yield _lines([_note(note) for note in result.notes])


def _holdings(result: Inspection) -> Table:
    totals = result.totals
    ours = "padconvert would make" if result.trained is None else "padconvert"
    names = ("static source", *((ours, "fully dynamic") if totals.params_output is not None else ()))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows = cost_rows(totals, written=result.trained is not None, routed=chooses(result.layers))
    for label, values, said in rows:
        _add_cost(table, label, values[: len(names)], said)
    return table


# ---- verify


def _verification(result: Verification) -> Iterator[RenderableType]:
    yield Text(result.path, style="bold")
    said = [(check, _said(check)) for check in result.checks]
    yield _lines([_check(check.passed, line) if check.held else _note(line) for check, line in said])
    count = sum(check.held for check in result.checks)
    checks = f"{count} check{'' if count == 1 else 's'}"
    failed = sum(not check.passed for check in result.checks)
    verdict = f"{failed} of {checks} failed" if failed else f"all {checks} passed"
    yield Text(verdict, style="bold red" if failed else "bold green")


def _said(check: Check) -> str:
    words = [check.name.replace("_", " ")]
    if check.value is not None:
        words.append(f": {_value(check.value)}")
    match check.limit:
        case str() if check.limit == check.value:
            words.append(" (as recorded)")
        case str():
            words.append(f" (recorded: {check.limit})")
        case float() | int():
            words.append(f" (limit {_value(check.limit)})")
    return "".join(words) + (f"; {check.detail}" if check.detail else "")


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


# ---- inspect --audit


def _audited(result: Audited) -> Iterator[RenderableType]:
    yield Text(f"{result.path}: {result.kind}, {numbers.size(result.bytes)}", style="bold")
    for title, rows in (
        ("names", [_check(name.allowed, f"{name.name}: {name.why}") for name in result.names]),
        ("members", [_note(f"{member.name}: {numbers.size(member.bytes)}") for member in result.members]),
    ):
        if rows:
            # what is refused is never cut off
            shown = [row for i, row in enumerate(rows) if i < ROWS or row.plain.startswith("✗")]
            left = [_note(f"and {len(rows) - len(shown)} more (--json lists them)")] if len(shown) < len(rows) else []
            yield _lines([Text(f"{len(rows)} {title}"), *shown, *left])
    words = {
        "safe": "safe: nothing in it runs, and all that it names is listed",
        "trust": f"needs --trust {' --trust '.join(result.trust)}: its classes lie outside the list",
    }
    said = words.get(result.verdict, result.verdict)
    yield Text(said, style="bold green" if result.verdict == "safe" else "bold red")


# ---- doctor


def _diagnosis(result: Diagnosis) -> Iterator[RenderableType]:
    yield Text(f"Python {result.python} on {result.platform}", style="bold")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    for name, found in result.versions.items():
        table.add_row(name, Text("not installed", style="dim") if found is None else found)
    yield table
    yield Text(f"devices: {', '.join(result.devices)} · {result.threads} threads on {result.cores} cores")
    yield _lines([_extra(extra) for extra in result.extras])


def _extra(extra: Extra) -> Text:
    if not extra.missing:
        return _check(True, f"{extra.name}: {extra.purpose}")
    return Text(f"· {extra.name}: {extra.purpose}; {', '.join(extra.missing)} missing: {extra.install}", style="yellow")


# ---- lines


def _check(passed: bool, said: str) -> Text:
    line = Text("✓ " if passed else "✗ ", style="green" if passed else "bold red")
    return line.append(said, style="default" if passed else "red")


def _note(said: str) -> Text:
    return Text(f"· {said}", style="dim")


def _lines(lines: Sequence[Text]) -> Text:
    return Text("\n").join(lines)
