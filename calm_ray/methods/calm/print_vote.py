"""`calm-ray stats`: prints a report of sampled answers (`sample_report`)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from calm_ray.core.console import console
from calm_ray.evaluation.tables import percent, plain_table
from calm_ray.methods.calm.vote_audit import print_vote_audit

BAR = 40
"""Length of the longest histogram bar, in characters."""


def print_statistics(title: str, stats: dict[str, Any]) -> None:
    """Prints accuracy (CALM, Figure 3), winning and losing completions (Tables 7 and 8) and agreement."""
    console.print(_by_language(title, stats))
    if "chosen_right" in stats:
        sides = ", ".join(
            f"{name.replace('_', ' ')} {percent(stats[name])}"
            for name in ("chosen_right", "rejected_right", "both_wrong")
        )
        console.print(f"{stats['pairs']} pairs: {sides} percent")
    fractions = f"tied {percent(stats['tied'])}, unparseable {percent(stats['unparseable_samples'])}"
    agree = f"Consistency_2 {percent(stats['consistency'])}, AC3_2 {percent(stats.get('ac3'))}"
    console.print(f"{fractions}, translated {percent(stats['translated'])} percent; {agree}\n")
    console.print(_histogram(stats["agreement"]))
    if stats["audit"] is not None:
        print_vote_audit(stats["audit"], list(stats["pairs_by_language"]))


def _by_language(title: str, stats: dict[str, Any]) -> Table:
    table = plain_table(f"{title}, percent")
    languages = list(stats["pairs_by_language"])
    table.add_column("")
    for name in [*languages, "vote"]:
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, dict[str, float] | None, float | None]] = [
        ("accuracy: single sample", stats.get("sample_accuracy"), None),
        ("accuracy: first answer", stats.get("accuracy_by_language"), None),
        ("accuracy: majority", stats.get("own_vote_accuracy"), stats.get("vote_accuracy")),
        ("winning completions", stats["positives"], None),
        ("chosen sides written in", stats["chosen_from"], None),
        ("rejected sides in", _fractions(stats["pairs_by_language"]), None),
    ]
    for name, of_languages, of_vote in rows:
        if of_languages:
            table.add_row(
                name, *(percent(of_languages[code]) for code in languages), "" if of_vote is None else percent(of_vote)
            )
    return table


def _fractions(counts: dict[str, int]) -> dict[str, float]:
    total = max(1, sum(counts.values()))
    return {code: count / total for code, count in counts.items()}


def _histogram(agreement: dict[str, float]) -> Table:
    table = plain_table("questions by agreement (fraction of answers equal to the most frequent one), percent")
    for name in ("agreement", "questions", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    longest = max(agreement.values(), default=0.0) or 1.0
    for tenth, fraction in agreement.items():
        bar = "▇" * round(BAR * fraction / longest)
        table.add_row(f"{int(tenth) * 10}-{int(tenth) * 10 + 10}", percent(fraction), bar)
    return table
