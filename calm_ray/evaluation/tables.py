"""Tables and percentages in the format shared by all reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def evaluation_table(title: str, report: dict[str, Any]) -> Table:
    """Returns a table of one policy's report."""
    table = plain_table(title)
    cells = {
        **dict(report["accuracy"].items()),
        "mean": report["accuracy_mean"],
        **{f"Consistency_{size}": value for size, value in report["consistency"].items()},
        **{f"AC3_{size}": value for size, value in report["ac3"].items()},
        "unparseable": report["unparseable"],
    }
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(percent(value) for value in cells.values()))
    return table


def plain_table(title: str) -> Table:
    """Returns an empty table in the style of all reports."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)


def percent(fraction: float | None) -> str:
    """Formats a fraction as a percentage; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


OPTIMAL = "optimal"
"""Name of the optimal policy under a reference (DCO) in reports and tables."""
PARTS = {"held_out": "held-out questions", "training": "training questions"}
"""The two question sets: key in reports, title in tables."""


def candidate_tables(method: str, rounds: list[dict[str, Any]]) -> Iterator[Table]:
    """Yields tables of how consistently languages rank candidates: each round, then the first optimal policy.

    `rounds` are entries of summary.json; entries without scored candidates are omitted.
    """
    for part, name in PARTS.items():
        rows = [(str(e["round"]), e if part == "held_out" else e.get(part, {})) for e in rounds]
        optimal = first_optimum(rounds, part)
        rows += [(OPTIMAL, optimal)] if optimal else []
        if not any("rankc" in report for _, report in rows):
            continue
        table = plain_table(f"{method}: {name}, candidates, percent")
        for column in ("round", "RankC\nmean", "RankC\nwith en", "top-1\nagree", "accuracy", "entropy\nright", "wrong"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, report in rows:
            if "rankc" in report:
                table.add_row(label, *_candidate_cells(report))
        yield table


def first_optimum(rounds: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Returns the report of the optimal policy under a run's first reference; empty if there is none."""
    found = [entry[OPTIMAL][part] for entry in rounds[1:] or rounds if part in entry.get(OPTIMAL, {})]
    return found[0] if found else {}


def _candidate_cells(report: dict[str, Any]) -> list[str]:
    """RankC, agreement and accuracy in percent, entropies in nats."""
    entropies = [report.get("entropy", {}).get(name, {}).get("mean") for name in ("right", "wrong")]
    fractions = [report["rankc_mean"], report["rankc_en"], report["top1"], report.get("accuracy_mean")]
    return [percent(value) for value in fractions] + ["-" if value is None else f"{value:.2f}" for value in entropies]
