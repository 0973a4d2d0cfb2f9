"""A policy's answers, subject by subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from calm_ray.evaluation.metrics import accuracy, consistency
from calm_ray.evaluation.tables import percent, plain_table

MAX_SUBJECTS = 20
"""No table is printed for more than this."""


def subject_report(
    answers: Mapping[tuple[str, str], str | None], subjects: Mapping[str, str], gold: Mapping[str, str]
) -> dict[str, Any]:
    """Returns accuracy by language, and Consistency_2, of the questions of each subject, as fractions from 0 to 1.

    `answers` maps (language, question_id) to an answer, `subjects` and `gold` question_id to a subject and to the right
    answer. Empty if the questions do not have at least two subjects.
    """
    by_subject: dict[str, dict[str, dict[str, str | None]]] = defaultdict(lambda: defaultdict(dict))
    for (language, question_id), answer in answers.items():
        if question_id in subjects:
            by_subject[subjects[question_id]][language][question_id] = answer
    return {subject: _of_subject(own, gold) for subject, own in sorted(by_subject.items()) if len(by_subject) > 1}


def _of_subject(answers: Mapping[str, Mapping[str, str | None]], gold: Mapping[str, str]) -> dict[str, Any]:
    questions = next(iter(answers.values()))
    known = {question_id: gold[question_id] for question_id in questions if question_id in gold}
    return {
        "questions": len(questions),
        "accuracy": {code: accuracy(own, known) for code, own in answers.items()} if known else None,
        "consistency": consistency(answers, 2) if len(answers) > 1 else None,
    }


def subject_tables(rounds: list[dict[str, Any]]) -> Iterator[Table]:
    """Yields a table of the first and the last round by subject, if there are at least two and not too many."""
    found = [(entry["round"], entry["by_subject"]) for entry in rounds if entry.get("by_subject")]
    languages = list(rounds[0].get("accuracy", {}))
    if not found or len(found[0][1]) > MAX_SUBJECTS:
        return
    table = plain_table("held-out questions by subject, percent")
    for name in ("subject", "questions", "round", *languages, "mean", "Consis-\ntency_2"):
        table.add_column(name, justify="left" if name == "subject" else "right", no_wrap=True)
    shown = found if len(found) == 1 else [found[0], found[-1]]
    for subject in found[0][1]:
        for number, (round_number, reports) in enumerate(shown):
            report = reports[subject]
            own = report["accuracy"] or {}
            mean = sum(own.values()) / len(own) if own else None
            head = [subject, str(report["questions"])] if number == 0 else ["", ""]
            cells = [percent(own.get(code)) for code in languages] + [percent(mean), percent(report["consistency"])]
            table.add_row(*head, str(round_number), *cells)
    yield table
