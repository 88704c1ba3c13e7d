"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LEVELS = "▁▂▃▄▅▆▇█"


def size(count: int) -> str:
    """Bytes in decimal units: `1.94 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def share(value: float, digits: int = 1) -> str:
    """A fraction as a percentage: `30.0 %`."""
    return f"{100 * value:.{digits}f} %"


def times(value: float, base: float) -> str:
    """`value` in units of `base`: `1.90×`; nothing where the base is nothing."""
    return f"{value / base:.2f}×" if base else ""


def shape(numbers: Sequence[int]) -> str:
    return "×".join(str(number) for number in numbers)


def metric(name: str, value: float) -> str:
    """Accuracy and F1 as percentages; losses, errors and correlations as plain numbers."""
    return share(value, 2) if "accuracy" in name or "f1" in name else f"{value:.4f}"


def bar(value: float, width: int) -> str:
    """A bar of `width` cells, filled to the fraction `value`; only 0 is empty and only 1 is full."""
    inside = min(max(round(value * width), 1), width - 1) if 0 < value < 1 else round(value) * width
    return "█" * inside + "░" * (width - inside)


def columns(values: Sequence[float]) -> str:
    """One character a value, as high as its share of the largest; only what is nothing is blank."""
    top = max(values, default=0.0) or 1.0
    return "".join(LEVELS[min(int(value / top * 8), 7)] if value else " " for value in values)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` in at most `width` characters; each character is the mean of its stretch."""
    cells = min(width, len(values))
    edges = [len(values) * i // cells for i in range(cells + 1)] if cells else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join(LEVELS[min(int((mean - low) / span * 8), 7)] for mean in means)


def seconds(value: float) -> str:
    """`0.4 s`, `41 s`, `3 min 20 s`."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"
