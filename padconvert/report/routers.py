"""How routers use their experts, for a person."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from padconvert.report import numbers
from padconvert.results import COLLAPSED, STARVED, RouterUse


def routers_table(uses: Sequence[RouterUse], *, limit: int | None = None) -> Table:
    """One row a router. With a `limit` and more routers than that, those with a mark are shown first."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("router of")
    for name in ("use of experts", "least", "most", "entropy of use", "of routing"):
        table.add_column(name, justify="left" if name == "use of experts" else "right", no_wrap=True)
    table.add_column("")
    shown = sorted(range(len(uses)), key=lambda i: (not mark(uses[i]), i))[:limit]
    for use in (uses[i] for i in sorted(shown)):
        table.add_row(
            use.layer or "(the model itself)",
            Text(numbers.columns(use.usage), style="cyan"),
            *(numbers.share(share) for share in (min(use.usage), max(use.usage))),
            *(f"{entropy:.2f}" for entropy in (use.usage_entropy, use.routing_entropy)),
            Text(mark(use), style="yellow"),
        )
    if len(shown) < len(uses):
        table.add_row(Text(f"… and {len(uses) - len(shown)} more (--json lists them)", style="dim"))
    return table


def mark(use: RouterUse) -> str:
    """What is wrong with this use, in a word or two; "" where nothing is."""
    if use.collapsed:
        return "collapsed"
    return f"{use.starved} starved" if use.starved else ""


def legend() -> str:
    """What the columns and marks mean, with the thresholds."""
    return (
        "one column an expert: its share of the choices (where all are mixed, of the weights), beside the most used. "
        "Entropies are shares of the highest: of use 1 where all experts are used alike, of routing 0 where one "
        "expert decides. "
        f"Starved: less than {numbers.share(STARVED, 0)} of an even share; collapsed: entropy of use below {COLLAPSED}"
    )
