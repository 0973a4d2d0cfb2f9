"""summary.json: one entry per round, assembled from the steps' summaries of their records."""

from __future__ import annotations

from typing import Any

from calm_ray.config import Config
from calm_ray.core.console import console
from calm_ray.evaluation.by_subject import subject_tables
from calm_ray.evaluation.tables import candidate_tables, percent, plain_table
from calm_ray.methods.base import Entry, Step
from calm_ray.run.directory import RunDirectory

ACCURACY_COLUMNS = ("Consis-\ntency_2", "AC3_2", "unparse-\nable")
"""Split over two lines so that a table with a few languages fits into 80 columns."""


def summarize(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Writes summary.json for the finished rounds and collects their training metrics."""
    steps = (*config.steps, config.training, *config.evaluation)
    answers, *_ = config.evaluation
    numbers = [n for n in range(config.rounds + 1) if run.stage(n, answers.name).is_finished]
    rounds = [_entry(run, number, steps, answers) for number in numbers]
    summary = {"method": config.method, "seed": config.seed, "languages": config.languages, "rounds": rounds}
    run.storage.write_json("summary.json", summary)
    run.write_metrics(config.rounds)
    return summary


def _entry(run: RunDirectory, number: int, steps: tuple[Step, ...], answers: Step) -> Entry:
    """The entry of round `number`: how its policy performs and what producing it cost.

    Includes what the next round's steps report about the policy they start from; nothing for the last round.
    """
    evaluated = run.stage(number, answers.name).record
    entry: Entry = {"round": number, "policy": evaluated["policy"], "refresh_seconds": evaluated["refresh_seconds"]}
    seconds: dict[str, float] = {}
    for step in steps:
        if (record := _record(run, number, step.name)) is not None:
            entry |= step.summary(record)
            seconds |= {step.name: record["seconds"]} if "seconds" in record else {}
        if (record := _record(run, number + 1, step.name)) is not None:
            entry |= step.summary_of_start(record)
    return {**entry, "seconds": seconds}


def _record(run: RunDirectory, number: int, name: str) -> Entry | None:
    stage = run.stage(number, name)
    return stage.record if stage.is_finished else None


def print_summary(config: Config, summary: dict[str, Any]) -> None:
    """Prints the final table: one line per round, in percent."""
    rounds = summary["rounds"]
    # The evaluation languages, which may include more than the run aligns.
    languages = list(rounds[0].get("accuracy", summary["languages"]))
    columns = [column for step in (*config.steps, *config.evaluation) for column in step.columns]
    table = plain_table(f"{summary['method']}: held-out questions, percent")
    for name in ["round", *languages, "mean", *ACCURACY_COLUMNS, *(column.title for column in columns), "seconds"]:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in rounds:
        cells = [column.cell(entry) for column in columns] + [f"{sum(entry['seconds'].values()):.0f}"]
        table.add_row(str(entry["round"]), *_accuracies(entry, languages), *cells)
    console.print(table)
    for column in columns:
        if column.note and any(column.cell(entry) != "-" for entry in rounds):
            console.print(column.note)
    if since := rounds[-1].get("changed", {}).get("0"):
        changed = "  ".join(f"{code} {percent(share)}" for code, share in since.items())
        console.print(f"answers changed since round 0, percent: {changed}")
    for table in subject_tables(rounds):
        console.print(table)
    for candidates in candidate_tables(summary["method"], rounds):
        console.print(candidates)


def _accuracies(entry: Entry, languages: list[str]) -> list[str]:
    if "accuracy" not in entry:
        return ["-"] * (len(languages) + 1 + len(ACCURACY_COLUMNS))
    cells = [percent(entry["accuracy"][code]) for code in languages]
    cells += [percent(entry["accuracy_mean"]), percent(entry["consistency"].get("2"))]
    return [*cells, percent(entry["ac3"].get("2")), percent(entry["unparseable"])]
