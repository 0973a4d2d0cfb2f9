"""Tables and percentages as all of calm_ray's reports print them."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def evaluation_table(title: str, report: dict[str, Any]) -> Table:
    """One policy's report as a table."""
    table = plain_table(title)
    cells = {
        **dict(report["accuracy"].items()),
        "mean": report["accuracy_mean"],
        **{f"Consistency_{size}": value for size, value in report["consistency"].items()},
        **{f"AC3_{size}": value for size, value in report["ac3"].items()},
        "unreadable": report["unreadable"],
    }
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(percent(value) for value in cells.values()))
    return table


def plain_table(title: str) -> Table:
    """A table as all of calm_ray's reports have it."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)


def percent(share: float | None) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"
