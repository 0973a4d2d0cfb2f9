"""Tables and percentages as all of calm_ray's reports print them."""

from __future__ import annotations

from collections.abc import Iterator
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


OPTIMAL = "optimal"
"""What reports and tables call the optimal policy that a reference leads to (DCO)."""
PARTS = {"held_out": "held-out questions", "training": "questions trained on"}
"""Both sets of questions, as reports and tables name them."""


def candidate_tables(method: str, rounds: list[dict[str, Any]]) -> Iterator[Table]:
    """How alike the languages rank their candidates, round for round, beside the optimal policy of the first.

    `rounds` are entries of summary.json; those without scored candidates give no table.
    """
    for part, name in PARTS.items():
        rows = [(str(e["round"]), e if part == "held_out" else e.get(part, {})) for e in rounds]
        optimal = first_optimum(rounds, part)
        rows += [(OPTIMAL, optimal)] if optimal else []
        if not any("rankc" in report for _, report in rows):
            continue
        table = plain_table(f"{method}: {name}, candidates, percent")
        for column in ("round", "RankC\nmean", "RankC\nwith en", "top-1\nalike", "accuracy", "entropy\nright", "wrong"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, report in rows:
            if "rankc" in report:
                table.add_row(label, *_candidate_cells(report))
        yield table


def first_optimum(rounds: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """The report of the optimal policy that a run's first reference leads to; empty where there is none."""
    found = [entry[OPTIMAL][part] for entry in rounds[1:] or rounds if part in entry.get(OPTIMAL, {})]
    return found[0] if found else {}


def _candidate_cells(report: dict[str, Any]) -> list[str]:
    """RankC, agreement and accuracy in percent, entropies in nats."""
    entropies = [report.get("entropy", {}).get(name, {}).get("mean") for name in ("right", "wrong")]
    shares = [report["rankc_mean"], report["rankc_en"], report["top1"], report.get("accuracy_mean")]
    return [percent(share) for share in shares] + ["-" if value is None else f"{value:.2f}" for value in entropies]
