"""A bench on the terminal: each network's time over the static one's, and layer by layer where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from padconvert.report import numbers
from padconvert.results import Bench, BenchBatch, BenchLayer, Machine, Timed

#: the most layers of a batch size that are shown, those that cost the most time first
LAYERS = 40


def blocks(result: Bench) -> Iterator[RenderableType]:
    """What `padconvert bench` prints."""
    shapes = ", ".join(numbers.shape(shape) or "a number" for shape in result.inputs.values())
    yield Group(
        Text(f"{result.artefact} beside {result.source}", style="bold"),
        Text(f"{machine(result.machine)} · {result.dtype} · inputs {shapes}", style="dim"),
    )
    yield times_table(result)
    if result.layers:
        for batch in result.batches:
            rows = [layer for layer in result.layers if layer.batch_size == batch.batch_size]
            if rows:
                yield layers_table(rows)
    notes = [*result.notes, *([] if result.complete else ["interrupted: some of it was not measured"])]
    if notes:
        yield Text("\n".join(f"· {note}" for note in notes), style="dim")


def machine(found: Machine) -> str:
    """The machine in a line."""
    cores, threads = f"{found.cores} cores ({found.vectors})", f"{found.threads} thread{'s' * (found.threads != 1)}"
    return f"{found.device}, {cores}, {threads}, torch {found.torch}"


def times_table(result: Bench) -> Table:
    """Medians, with the quartiles of their ratio to the static network under them."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for name in ("static source", "padconvert", "fully dynamic"):
        table.add_column(name, justify="right", no_wrap=True, style="bold green" if name == "padconvert" else "")
    table.add_column("padconvert over fully dynamic", justify="right")
    for batch in result.batches:
        _batch(table, batch)
    sizes = (result.bytes_static, result.bytes_output, result.bytes_fully_dynamic)
    table.add_row("tensors", *map(numbers.size, sizes), numbers.times(sizes[1], sizes[2]))
    return table


def _batch(table: Table, batch: BenchBatch) -> None:
    every = (batch.static, batch.output, batch.fully_dynamic)
    table.add_row(
        f"batch of {batch.batch_size}", *(milliseconds(each.seconds) for each in every),
        f"{batch.output_over_fully_dynamic:.2f}×",
    )  # fmt: skip
    table.add_row(f"  {batch.rounds} rounds", *map(_over, every), "")
    if any(each.peak_bytes is not None for each in every):
        peaks = ["–" if each.peak_bytes is None else f"+{numbers.size(each.peak_bytes)}" for each in every]
        table.add_row("  memory of a call", *peaks, "")


def _over(each: Timed) -> str:
    spread = f" ({each.over_static_low:.2f}–{each.over_static_high:.2f})"
    return f"{each.over_static:.2f}×" + (spread if each.over_static_low != each.over_static_high else "")


def layers_table(layers: Sequence[BenchLayer]) -> RenderableType:
    """One batch size's layers in module order; of many, those that take the most time."""
    shown = sorted(range(len(layers)), key=lambda i: -layers[i].seconds_output)[:LAYERS]
    paths = any(layer.path for layer in layers)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(f"layer, batch of {layers[0].batch_size}")
    table.add_column("weight", no_wrap=True)
    for name in ("static", "padconvert", "over static", "fully dynamic over static"):
        table.add_column(name, justify="right")
    if paths:
        table.add_column("path", no_wrap=True)
    for layer in (layers[i] for i in sorted(shown)):
        table.add_row(
            layer.name, numbers.shape(layer.weight_shape), milliseconds(layer.seconds_static),
            milliseconds(layer.seconds_output), f"{layer.over_static:.2f}×",
            f"{layer.fully_dynamic_over_static:.2f}×", *([layer.path or ""] if paths else []),
        )  # fmt: skip
    hidden = len(layers) - len(shown)
    more = [Text(f"… and {hidden} layers that take less time: --json lists them", style="dim")] if hidden else []
    return Group(table, *more)


def milliseconds(seconds: float) -> str:
    """`12.3 ms`, three digits."""
    value = 1000 * seconds
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
