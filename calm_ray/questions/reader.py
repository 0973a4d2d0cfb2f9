"""Reads a user's own questions, jsonl or parquet, and refuses what cannot be used, naming the file and the row."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calm_ray.errors import InputError
from calm_ray.rows import Question, rows_of, table
from calm_ray.rundir import Stage
from calm_ray.sampling.prompts import LETTERS

REQUIRED = ("question_id", "language", "text", "choices")


def read_questions(path: str, languages: Sequence[str], *, needs_gold: bool = False) -> list[Question]:
    """The questions of a file in the given languages, ordered by question and then by language.

    Every row has `question_id`, `language`, `text`, `choices` and optionally `gold` (a letter) and `subject`; rows of
    other languages are left out. Raises InputError unless every question is there in every language, with the same
    number of choices and the same gold answer.
    """
    file = Path(path).expanduser()
    questions: dict[str, dict[str, tuple[int, Question]]] = defaultdict(dict)
    for number, raw in _rows(file):
        row = _checked(raw, f"{file}, row {number}", needs_gold)
        if row["language"] not in languages:
            continue
        same = questions[row["question_id"]]
        if row["language"] in same:
            first = same[row["language"]][0]
            raise InputError(
                f"{file}, row {number}: question {row['question_id']!r} in {row['language']!r} was there in row {first}"
            )
        same[row["language"]] = (number, row)
    if not questions:
        raise InputError(f"{file}: holds no question in {', '.join(languages)}")
    for question_id, rows in questions.items():
        _check_parallel(file, question_id, rows, languages)
    return [rows[language][1] for rows in questions.values() for language in languages]


def write_chunks(questions: Sequence[Question], stage: Stage, prompts_per_chunk: int) -> None:
    """Writes questions into a stage, `prompts_per_chunk` of them (in all their languages) to a file."""
    if stage.is_finished:
        return
    order = list(dict.fromkeys(row["question_id"] for row in questions))
    by_id: dict[str, list[Question]] = defaultdict(list)
    for row in questions:
        by_id[row["question_id"]].append(row)
    for number, first in enumerate(range(0, len(order), prompts_per_chunk)):
        ids = order[first : first + prompts_per_chunk]
        stage.write(f"{number:05d}", table(Question, [row for one in ids for row in by_id[one]]))
    stage.finish({"questions": len(order), "rows": len(questions)})


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their numbers, from 1."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file of questions")
    if file.suffix == ".parquet":
        try:
            rows = rows_of(pq.read_table(file))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not readable as Parquet: {error}") from None
        yield from enumerate(rows, start=1)
        return
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{file}, row {number}: not readable as JSON: {error}") from None


def _checked(raw: Any, where: str, needs_gold: bool) -> Question:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: is not a record with the fields {', '.join(REQUIRED)}")
    for field in REQUIRED:
        if not raw.get(field):
            raise InputError(f"{where}: field {field!r} is missing or empty")
    choices = raw["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise InputError(f"{where}: field 'choices' must be a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: field 'choices' has {len(choices)} entries; it must have 2 to {len(LETTERS)}")
    gold = raw.get("gold")
    if gold is None and needs_gold:
        raise InputError(f"{where}: field 'gold' is missing; questions for evaluation need their right letter")
    if gold is not None and gold not in list(LETTERS[: len(choices)]):
        raise InputError(
            f"{where}: field 'gold' is {gold!r}; it must be a letter from A to {LETTERS[len(choices) - 1]}"
        )
    subject = raw.get("subject")
    return Question(
        question_id=str(raw["question_id"]),
        language=str(raw["language"]),
        text=str(raw["text"]),
        choices=choices,
        gold=gold,
        subject=None if subject is None else str(subject),
    )


def _check_parallel(
    file: Path, question_id: str, rows: dict[str, tuple[int, Question]], languages: Sequence[str]
) -> None:
    some_number, some = next(iter(rows.values()))
    missing = [language for language in languages if language not in rows]
    if missing:
        raise InputError(
            f"{file}, row {some_number}: question {question_id!r} is not there in {', '.join(missing)}; "
            "add it, or take the language out of `languages`"
        )
    for number, row in rows.values():
        if len(row["choices"]) != len(some["choices"]):
            raise InputError(
                f"{file}, row {number}: question {question_id!r} has {len(row['choices'])} choices in "
                f"{row['language']!r}, but {len(some['choices'])} in {some['language']!r} (row {some_number})"
            )
        if row["gold"] != some["gold"]:
            raise InputError(
                f"{file}, row {number}: question {question_id!r} has gold {row['gold']!r} in {row['language']!r}, "
                f"but {some['gold']!r} in {some['language']!r} (row {some_number}); choices must be parallel"
            )
