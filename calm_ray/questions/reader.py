"""Reads questions row by row, checks them and collects those that a run can use in all its languages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.rows import Question, table
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.formats import RecordContext, format_named
from calm_ray.questions.parallel import Index, Problem, Seen, refusal
from calm_ray.questions.records import Record, read_records
from calm_ray.questions.sources import Part, open_source
from calm_ray.run.stage import Stage

OnBadRow = Literal["refuse", "skip"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source and what it was parsed into."""

    part: Part
    number: int
    """From 1, within its part."""
    found: Question | BadRow
    notes: Sequence[str]
    """What was repaired or tolerated."""

    @property
    def question(self) -> Question:
        """Raises BadRow for a bad row."""
        if isinstance(self.found, BadRow):
            raise self.found
        return self.found

    def problem(self, bad: BadRow) -> Problem:
        return Problem(self.part.name, self.number, str(bad))

    def seen(self, question: Question) -> Seen:
        return Seen(self.part.name, self.number, len(question["choices"]), question["gold"])


@dataclass(frozen=True)
class Intake:
    """The questions that a run takes from a source."""

    questions: list[Question]
    """Grouped by question, in file order; within a question, in the order of the requested languages."""
    skipped: list[Problem]
    """Bad rows, and questions left incomplete without them."""
    repaired: Counter[str] = field(default_factory=Counter)
    """How often each flaw was repaired or tolerated."""


def read(
    source: str, *, format: str | None = None, language: str | None = None, languages: Sequence[str] | None = None
) -> Iterator[Row]:
    """Yields every row of a source (see `open_source`), each checked on its own; holds at most one batch of rows.

    With `languages`, skips rows in other languages.
    """
    for part in open_source(source, format=format, language=language, languages=languages):
        for row in read_part(part):
            if languages is None or isinstance(row.found, BadRow) or row.found["language"] in languages:
                yield row


def read_part(part: Part) -> Iterator[Row]:
    """Yields the rows of one part, including bad ones."""
    for index, record in enumerate(read_records(part.name)):
        notes = list(record.notes)
        found: Question | BadRow
        try:
            found = question_of(part, record, index, notes)
        except BadRow as bad:
            found = bad
        yield Row(part, record.row, found, notes)


def question_of(part: Part, record: Record, index: int, notes: list[str]) -> Question:
    """Parses and checks a record, adding repairs to `notes`. Raises BadRow.

    `index` counts the part's records from 0; unlike row numbers, it skips empty lines.
    """
    if record.bad is not None:
        raise record.bad
    if not isinstance(record.value, dict) or part.format is None:
        raise BadRow("is not a record with fields", f"{record.value!r:.80}")
    layout = format_named(part.format)
    language = part.language
    if language is None:
        assert layout.language_field is not None
        name = record.value.get(layout.language_field)
        if not name:
            raise BadRow(f"field {layout.language_field!r} is missing or empty")
        language = language_code(str(name))
        if language is None:
            raise BadRow("unknown language", f"{name!r}; known languages: {', '.join(LANGUAGES)}")
    question = layout.parse(record.value, RecordContext(language, index, notes.append))
    _check(question, notes)
    return question


def _check(question: Question, notes: list[str]) -> None:
    """Raises BadRow for a question that cannot be asked."""
    choices, gold = question["choices"], question["gold"]
    if not question["text"].strip():
        raise BadRow("the text is empty")
    check_characters([question["question_id"], question["text"], question["subject"] or "", *choices])
    is_open = not choices and gold is None
    if not is_open and not 2 <= len(choices) <= len(LETTERS):
        raise _wrong_number_of_choices(question)
    for letter, choice in zip(LETTERS, choices, strict=False):
        if not choice.strip():
            raise BadRow("a choice is empty", letter)
    if gold is not None and gold not in list(LETTERS[: len(choices)]):
        raise BadRow(
            "the gold answer is not one of the choices", f"{gold!r}; choices are A to {LETTERS[len(choices) - 1]}"
        )
    if len(set(choices)) < len(choices):
        notes.append("two choices have the same text; kept")


def _wrong_number_of_choices(question: Question) -> BadRow:
    return BadRow(f"a question must have 2 to {len(LETTERS)} choices", f"it has {len(question['choices'])}")


def check_characters(texts: Iterable[str]) -> None:
    """Raises BadRow for a lone surrogate, which JSON can hold but the run's UTF-8 files cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadRow("contains a lone surrogate", repr(error.object[error.start])) from None


def load_questions(
    source: str,
    languages: Sequence[str],
    *,
    needs_gold: bool = False,
    on_bad_row: OnBadRow = "refuse",
    format: str | None = None,
    language: str | None = None,
    allow_missing: Sequence[str] = (),
    check: Callable[[Question], None] | None = None,
    allow_open: bool = False,
) -> Intake:
    """Returns a source's questions that have all of `languages`, with the same number of choices and the same gold.

    A question may lack the languages in `allow_missing` (it will be translated). With `needs_gold`, at least one
    language of a question must have the gold letter, which counts for all. `check` raises BadRow for rows that the run
    cannot use. With `allow_open`, a question may have no choices. `refuse` reads everything, then raises InputError
    listing the bad rows; `skip` drops bad rows, questions that differ between languages, and those left incomplete.
    """
    index, skipped, repaired = Index(), list[Problem](), Counter[str]()
    kept: dict[str, dict[str, Question]] = defaultdict(dict)
    for row in read(source, format=format, language=language, languages=languages):
        repaired.update(row.notes)
        try:
            question = row.question
            if not question["choices"] and not allow_open:
                raise _wrong_number_of_choices(question)
            if check is not None:
                check(question)
            index.add(question["question_id"], question["language"], row.seen(question))
            kept[question["question_id"]][question["language"]] = question
        except BadRow as bad:
            skipped.append(row.problem(bad))
    needed = [code for code in languages if code not in allow_missing]
    conflicts = list(index.conflicts())
    skipped += [flaw.problem for flaw in conflicts]
    if on_bad_row == "refuse" and skipped:  # before gaps, since every bad row also leaves a gap
        raise refusal(skipped, len(skipped))
    _check_languages(source, index, needed, skipped)
    gaps = list(index.gaps(needed, needs_gold))
    skipped += [flaw.problem for flaw in gaps]
    if on_bad_row == "refuse" and gaps:
        raise refusal(skipped, len(skipped))
    for flaw in conflicts + gaps:
        kept.pop(flaw.question_id, None)
    if not kept:
        if skipped:
            raise InputError(f"{source}: no question is left after skipping bad rows; the first is {skipped[0]}")
        raise InputError(f"{source}: contains no questions in {', '.join(languages)}")
    return Intake([rows[code] for rows in kept.values() for code in languages if code in rows], skipped, repaired)


def _check_languages(source: str, index: Index, needed: Sequence[str], bad: Sequence[Problem]) -> None:
    """Raises InputError for a language without any questions: no row is to blame, so `skip` does not help."""
    counts = index.counts()
    if missing := [code for code in needed if code not in counts]:
        in_languages = f"questions in {', '.join(missing)}"
        if bad:
            raise InputError(f"{source}: contains no usable {in_languages}; the first bad row is {bad[0]}")
        raise InputError(f"{source}: contains no {in_languages}")


def write_chunks(questions: Sequence[Question], stage: Stage, prompts_per_chunk: int, **record: Any) -> None:
    """Writes questions into a stage, `prompts_per_chunk` questions (in all their languages) per file.

    The stage's record holds their number and the fields of `record`.
    """
    if stage.is_finished:
        return
    order = list(dict.fromkeys(row["question_id"] for row in questions))
    by_id: dict[str, list[Question]] = defaultdict(list)
    for row in questions:
        by_id[row["question_id"]].append(row)
    existing = stage.chunks()
    for number, first in enumerate(range(0, len(order), prompts_per_chunk)):
        ids = order[first : first + prompts_per_chunk]
        chunk, rows = f"{number:05d}", table(Question, [row for one in ids for row in by_id[one]])
        if chunk not in existing or not stage.read_chunk(chunk).equals(rows):
            stage.write(chunk, rows)
        existing.discard(chunk)
    if existing:  # left by an interrupted attempt, when the source had more questions
        stage.forget([f"{chunk}.parquet" for chunk in existing])
    stage.finish({"questions": len(order), "rows": len(questions), **record})
