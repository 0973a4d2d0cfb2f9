"""`calm-ray stats`: what a report of sampled answers (`sample_report`) says, as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from calm_ray.core.console import console
from calm_ray.evaluation.tables import percent, plain_table

BAR = 40
"""Characters of the longest bar of the histogram."""


def print_statistics(title: str, stats: dict[str, Any]) -> None:
    """Who is right (CALM, Figure 3), whose completions win and lose (Tables 7 and 8), and how far answers agree."""
    console.print(_by_language(title, stats))
    if "chosen_right" in stats:
        sides = ", ".join(
            f"{name.replace('_', ' ')} {percent(stats[name])}"
            for name in ("chosen_right", "rejected_right", "both_wrong")
        )
        console.print(f"{stats['pairs']} pairs: {sides} percent")
    shares = f"tied {percent(stats['tied'])}, unreadable {percent(stats['unreadable_samples'])}"
    agree = f"Consistency_2 {percent(stats['consistency'])}, AC3_2 {percent(stats.get('ac3'))}"
    console.print(f"{shares}, carried over {percent(stats['carried'])} percent; {agree}\n")
    console.print(_histogram(stats["agreement"]))


def _by_language(title: str, stats: dict[str, Any]) -> Table:
    table = plain_table(f"{title}, percent")
    languages = list(stats["pairs_by_language"])
    table.add_column("")
    for name in [*languages, "vote"]:
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, dict[str, float] | None, float | None]] = [
        ("right: a single sample", stats.get("sample_accuracy"), None),
        ("right: the first answer", stats.get("accuracy_by_language"), None),
        ("right: the majority", stats.get("own_vote_accuracy"), stats.get("vote_accuracy")),
        ("winning completions", stats["positives"], None),
        ("chosen sides, written in", stats["chosen_from"], None),
        ("pairs, losing side in", _shares(stats["pairs_by_language"]), None),
    ]
    for name, of_languages, of_vote in rows:
        if of_languages:
            table.add_row(
                name, *(percent(of_languages[code]) for code in languages), "" if of_vote is None else percent(of_vote)
            )
    return table


def _shares(counts: dict[str, int]) -> dict[str, float]:
    total = max(1, sum(counts.values()))
    return {code: count / total for code, count in counts.items()}


def _histogram(agreement: dict[str, float]) -> Table:
    table = plain_table("questions by the share of answers that agree with the most frequent one, percent")
    for name in ("share", "questions", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    longest = max(agreement.values(), default=0.0) or 1.0
    for tenth, share in agreement.items():
        bar = "▇" * round(BAR * share / longest)
        table.add_row(f"{int(tenth) * 10}-{int(tenth) * 10 + 10}", percent(share), bar)
    return table
