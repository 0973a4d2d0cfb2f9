"""`calm-ray questions`: prints what a source contains."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

from rich.table import Table

from calm_ray.core.console import console, progress_bar
from calm_ray.prompts.questions import question_text
from calm_ray.questions.parallel import SHOWN, Problem
from calm_ray.questions.reader import OnBadRow, Row, read
from calm_ray.questions.survey import Survey, survey_rows


def show_questions(
    source: str,
    *,
    format: str | None = None,
    language: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    as_json: bool = False,
    rows: int = 10,
) -> None:
    """Reads a source and prints what it contains, with its first `rows` rows (at most ten).

    With `refuse`, raises InputError after printing if there are bad rows.
    """
    stream = read(source, format=format, language=language)
    found = survey_rows(source, stream if as_json else _with_progress(stream))
    if as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False, indent=2))
    else:
        print_survey(found, rows)
    if on_bad_row == "refuse" and (error := found.refusal()) is not None:
        raise error


def _with_progress(rows: Iterator[Row]) -> Iterator[Row]:
    """Yields the rows, with a progress bar once reading takes longer than a second."""
    started, reported, bar = time.monotonic(), 0, None
    with ExitStack() as stack:
        for number, row in enumerate(rows, start=1):
            yield row
            if number % 1_000 == 0 and time.monotonic() - started > 1:
                bar = bar or stack.enter_context(progress_bar("rows read"))
                bar.advance(number - reported)
                reported = number


def print_survey(found: Survey, rows: int = 10) -> None:
    """Prints the survey as tables."""
    console.print(f"{found.source}: format {found.format or 'unknown'}, {_files(found)}", markup=False)
    repaired, refused = found.repaired.total(), found.refused.total()
    counts = f"{found.kept:,} kept, {repaired:,} repairs or remarks, {refused:,} refused"
    console.print(f"{found.rows:,} rows: {counts}\n", markup=False)
    console.print(_languages(found))
    _reasons("refused", found.refused, found.bad_rows, SHOWN)
    _reasons("repaired or tolerated", found.repaired, found.notes, 5)
    for question in found.first[:rows]:
        gold = f", gold {question['gold']}" if question["gold"] else ""
        console.print(f"\n{question['question_id']} in {question['language']}{gold}", style="bold", markup=False)
        console.print(question_text(question), markup=False)


def _reasons(title: str, counts: Counter[str], rows: list[Problem], shown: int) -> None:
    """Prints how often each reason occurred, and the first rows."""
    if not counts:
        return
    console.print(f"\n{title}:", markup=False)
    for reason, count in counts.most_common():
        console.print(f"  {count:,} x {reason}", markup=False)
    for problem in rows[:shown]:
        console.print(f"    {problem}", markup=False)
    if (more := counts.total() - shown) > 0:
        console.print(f"    and {more:,} more", markup=False)


def _files(found: Survey) -> str:
    return "1 file" if len(found.files) == 1 else f"{len(found.files)} files"


def _languages(found: Survey) -> Table:
    table = Table()
    table.add_column("language")
    for name in ("questions", "choices", "with gold", "duplicates", "missing"):
        table.add_column(name, justify="right")
    for code, count in found.languages.items():
        fewest, most = count.min_choices, count.max_choices
        gold = f"{count.with_gold / count.questions:.1%}" if count.questions else "-"
        table.add_row(
            code, f"{count.questions:,}", f"{fewest}" if fewest == most else f"{fewest}-{most}", gold,
            f"{count.duplicates:,}", f"{count.missing:,}",
        )  # fmt: skip
    return table
