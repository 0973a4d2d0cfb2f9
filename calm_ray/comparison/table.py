"""The table of a comparison, with the columns of DCO's Table 1."""

from __future__ import annotations

from typing import Any

from calm_ray.comparison.contenders import BASE, Comparison
from calm_ray.core.console import console
from calm_ray.evaluation.score_report import ENGLISH
from calm_ray.evaluation.tables import first_optimum, percent, plain_table
from calm_ray.run.directory import RunDirectory

FRACTIONS = {"rankc_en": "CLC_all", "rankc_mean": "RankC\nmean", "accuracy_en": "A_EN", "accuracy_others": "A_not-EN"}
"""Fractions in a row, with their column titles."""

WORK = ("pairs", "seconds")
"""The cost of a row's runs."""
Row = dict[str, Any]


def table_rows(comparison: Comparison) -> list[Row]:
    """Returns a row per method in the requested order, then the optimal policy of each DCO run.

    Fractions are over held-out questions, from 0 to 1, or None if not available. `pairs` counts all pairs trained on;
    `seconds` is the total time of the run's own rounds, or of evaluation for the base.
    """
    runs = {one.method: one.run for one in comparison.contenders}
    rows = []
    for method in comparison.methods:
        if method == BASE:
            run = comparison.contenders[0].run
            rows.append(_row(method, run, run.summary["rounds"][0]) | _work(run.summary["rounds"][:1]))
        else:
            run = runs[method]
            rows.append(_row(method, run, run.summary["rounds"][-1]) | _work(run.summary["rounds"][1:]))
    for method in comparison.methods:
        optimum = {} if method == BASE else first_optimum(runs[method].summary["rounds"], "held_out")
        if optimum:
            rows.append(_row(f"pi* of {method}", runs[method], optimum))
    return rows


def _row(method: str, run: RunDirectory, report: dict[str, Any]) -> Row:
    fractions = {
        "rankc_en": report.get("rankc_en"),
        "rankc_mean": report.get("rankc_mean"),
        "accuracy_en": report.get("accuracy", {}).get(ENGLISH),
        "accuracy_others": report.get("accuracy_others"),
    }
    return {"method": method, "run": run.uri, "policy": report.get("policy"), **fractions}


def _work(rounds: list[dict[str, Any]]) -> Row:
    seconds = sum(sum(entry["seconds"].values()) for entry in rounds)
    pairs = sum(entry.get("pairs", 0) for entry in rounds)
    return dict(zip(WORK, (pairs, seconds), strict=True))


def print_rows(name: str, rows: list[Row]) -> None:
    """Prints percentages; with a base row, all other rows as differences from it."""
    base = next((row for row in rows if row["method"] == BASE), None)
    title = f"{name}: held-out questions, percent" + (f"; others as difference from {BASE}" if base else "")
    table = plain_table(title)
    table.add_column("method", no_wrap=True)
    for column in [*FRACTIONS.values(), *WORK]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        fractions = [percent(row[key]) if base in (None, row) else change(row[key], base[key]) for key in FRACTIONS]
        work = [f"{row[key]:.0f}" if key in row else "-" for key in WORK]
        table.add_row(row["method"], *fractions, *work)
    console.print(table)
    console.print("CLC_all: mean RankC over language pairs with English; RankC mean: over all pairs.")
    if len(rows) > 1 and any(row["policy"] is None for row in rows):
        console.print("pi*: the optimal policy under DCO's reference, without training.")


def change(fraction: float | None, base: float | None) -> str:
    """Formats a difference in percentage points, with sign; a dash if either value is None."""
    return "-" if fraction is None or base is None else f"{100 * (fraction - base):+.1f}"
