"""The methods side by side, with the columns of DCO's Table 1."""

from __future__ import annotations

from typing import Any

from calm_ray.comparison.contenders import BASE, Comparison
from calm_ray.core.console import console
from calm_ray.evaluation.score_report import ENGLISH
from calm_ray.evaluation.tables import first_optimum, percent, plain_table
from calm_ray.run.directory import RunDirectory

SHARES = {"rankc_en": "CLC_all", "rankc_mean": "RankC\nmean", "accuracy_en": "A_EN", "accuracy_others": "A_not-EN"}
"""The shares of a row by name, and what their columns are called."""

WORK = ("pairs", "seconds")
"""What a row's runs took."""
Row = dict[str, Any]


def table_rows(comparison: Comparison) -> list[Row]:
    """A row for each method in the order asked for, then the optimal policy of each run of DCO among them.

    Shares are of held-out questions, from 0 to 1, and None where there is none; `pairs` are all those trained on, and
    `seconds` all that a run's own rounds took: for the base, what it took to evaluate it.
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
    shares = {
        "rankc_en": report.get("rankc_en"),
        "rankc_mean": report.get("rankc_mean"),
        "accuracy_en": report.get("accuracy", {}).get(ENGLISH),
        "accuracy_others": report.get("accuracy_others"),
    }
    return {"method": method, "run": run.uri, "policy": report.get("policy"), **shares}


def _work(rounds: list[dict[str, Any]]) -> Row:
    seconds = sum(sum(entry["seconds"].values()) for entry in rounds)
    pairs = sum(entry.get("pairs", 0) for entry in rounds)
    return dict(zip(WORK, (pairs, seconds), strict=True))


def print_rows(name: str, rows: list[Row]) -> None:
    """Percent, and where there is a row of the base, the others as their difference to it."""
    base = next((row for row in rows if row["method"] == BASE), None)
    title = f"{name}: held-out questions, percent" + (f", and the difference to {BASE}" if base else "")
    table = plain_table(title)
    table.add_column("method", no_wrap=True)
    for column in [*SHARES.values(), *WORK]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shares = [percent(row[key]) if base in (None, row) else change(row[key], base[key]) for key in SHARES]
        work = [f"{row[key]:.0f}" if key in row else "-" for key in WORK]
        table.add_row(row["method"], *shares, *work)
    console.print(table)
    console.print("CLC_all: RankC of the pairs of languages with English, their mean; RankC mean: of all pairs.")
    if len(rows) > 1 and any(row["policy"] is None for row in rows):
        console.print("pi*: the optimal policy that DCO's reference leads to, without training.")


def change(share: float | None, base: float | None) -> str:
    """A difference in points of percent, with its sign; a dash where there is none."""
    return "-" if share is None or base is None else f"{100 * (share - base):+.1f}"
