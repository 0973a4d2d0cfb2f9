"""Reads questions row by row, checks them, and gathers those that a run can use in all its languages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.rows import Question, table
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.formats import At, format_named
from calm_ray.questions.parallel import Index, Problem, Seen, refusal
from calm_ray.questions.records import Record, read_records
from calm_ray.questions.sources import Part, open_source
from calm_ray.run.stage import Stage

OnBadRow = Literal["refuse", "skip"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source, and what it was read as."""

    part: Part
    number: int
    """From 1, in its part."""
    found: Question | BadRow
    notes: Sequence[str]
    """What was repaired, or kept in spite of something."""

    @property
    def question(self) -> Question:
        """Raises what makes a bad row bad."""
        if isinstance(self.found, BadRow):
            raise self.found
        return self.found

    def problem(self, bad: BadRow) -> Problem:
        return Problem(self.part.name, self.number, str(bad))

    def seen(self, question: Question) -> Seen:
        return Seen(self.part.name, self.number, len(question["choices"]), question["gold"])


@dataclass(frozen=True)
class Intake:
    """What a run takes from a source."""

    questions: list[Question]
    """Question by question as in the files, each in the languages asked for, in their order."""
    left_out: list[Problem]
    """Bad rows, and questions that are not complete without them."""
    repaired: Counter[str] = field(default_factory=Counter)
    """How often rows were repaired, or kept in spite of something, and why."""


def read(
    source: str, *, format: str | None = None, language: str | None = None, languages: Sequence[str] | None = None
) -> Iterator[Row]:
    """Every row of a source (see `open_source`), each checked for itself; never holds more than one batch of rows.

    With `languages`, rows of other languages are left out.
    """
    for part in open_source(source, format=format, language=language, languages=languages):
        for row in read_part(part):
            if languages is None or isinstance(row.found, BadRow) or row.found["language"] in languages:
                yield row


def read_part(part: Part) -> Iterator[Row]:
    """The rows of one part; bad ones among them."""
    for index, record in enumerate(read_records(part.name)):
        notes = list(record.notes)
        found: Question | BadRow
        try:
            found = question_of(part, record, index, notes)
        except BadRow as bad:
            found = bad
        yield Row(part, record.row, found, notes)


def question_of(part: Part, record: Record, index: int, notes: list[str]) -> Question:
    """A record as a checked question; what was repaired is added to `notes`. Raises BadRow.

    `index` counts the part's records from 0. Row numbers do not: they also count empty lines.
    """
    if record.bad is not None:
        raise record.bad
    if not isinstance(record.value, dict) or part.format is None:
        raise BadRow("is not a record with fields", f"{record.value!r:.80}")
    layout = format_named(part.format)
    language = part.language
    if language is None:
        assert layout.language_field is not None
        said = record.value.get(layout.language_field)
        if not said:
            raise BadRow(f"field {layout.language_field!r} is missing or empty")
        language = language_code(str(said))
        if language is None:
            raise BadRow("no known language", f"{said!r}; known are {', '.join(LANGUAGES)}")
    question = layout.parse(record.value, At(language, index, notes.append))
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
        raise _number_of_choices(question)
    for letter, choice in zip(LETTERS, choices, strict=False):
        if not choice.strip():
            raise BadRow("a choice is empty", letter)
    if gold is not None and gold not in list(LETTERS[: len(choices)]):
        raise BadRow("the gold answer is none of the choices", f"{gold!r} of A to {LETTERS[len(choices) - 1]}")
    if len(set(choices)) < len(choices):
        notes.append("two choices have the same text; kept")


def _number_of_choices(question: Question) -> BadRow:
    return BadRow(f"a question must have 2 to {len(LETTERS)} choices", f"it has {len(question['choices'])}")


def check_characters(texts: Iterable[str]) -> None:
    """Raises BadRow for half a character (a lone surrogate), which JSON can hold and no file of ours."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadRow("holds half a character", repr(error.object[error.start])) from None


def take_in(
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
    """The questions of a source that are there in all of `languages`, with as many choices and the same gold in each.

    A question may lack the languages of `allow_missing` (it will be translated). With `needs_gold` one of its languages
    must have its gold letter, which is that of all. `check` raises BadRow for what else a run cannot use. With
    `allow_open` a question may have no choices. `refuse` raises InputError when all is read, naming the bad rows;
    `skip` leaves out bad rows, questions that contradict themselves in another language, and those not complete then.
    """
    index, left_out, repaired = Index(), list[Problem](), Counter[str]()
    kept: dict[str, dict[str, Question]] = defaultdict(dict)
    for row in read(source, format=format, language=language, languages=languages):
        repaired.update(row.notes)
        try:
            question = row.question
            if not question["choices"] and not allow_open:
                raise _number_of_choices(question)
            if check is not None:
                check(question)
            index.add(question["question_id"], question["language"], row.seen(question))
            kept[question["question_id"]][question["language"]] = question
        except BadRow as bad:
            left_out.append(row.problem(bad))
    needed = [code for code in languages if code not in allow_missing]
    conflicts = list(index.conflicts())
    left_out += [flaw.problem for flaw in conflicts]
    if on_bad_row == "refuse" and left_out:  # said before what is missing, since a bad row is missing too
        raise refusal(left_out, len(left_out))
    _check_languages(source, index, needed, left_out)
    gaps = list(index.gaps(needed, needs_gold))
    left_out += [flaw.problem for flaw in gaps]
    if on_bad_row == "refuse" and gaps:
        raise refusal(left_out, len(left_out))
    for flaw in conflicts + gaps:
        kept.pop(flaw.question_id, None)
    if not kept:
        if left_out:
            raise InputError(f"{source}: no question is left without the bad rows, the first being {left_out[0]}")
        raise InputError(f"{source}: holds no question in {', '.join(languages)}")
    return Intake([rows[code] for rows in kept.values() for code in languages if code in rows], left_out, repaired)


def _check_languages(source: str, index: Index, needed: Sequence[str], bad: Sequence[Problem]) -> None:
    """Raises InputError for a language without a single question: no row is to blame for that, so none is skipped."""
    there = index.counts()
    if lacking := [code for code in needed if code not in there]:
        said = f"{source}: holds no question in {', '.join(lacking)}"
        raise InputError(f"{said} that can be used; the first bad row is {bad[0]}" if bad else said)


def write_chunks(questions: Sequence[Question], stage: Stage, prompts_per_chunk: int, **record: Any) -> None:
    """Writes questions into a stage, `prompts_per_chunk` of them (in all their languages) to a file.

    The stage's record holds how many there are, and what else is given.
    """
    if stage.is_finished:
        return
    order = list(dict.fromkeys(row["question_id"] for row in questions))
    by_id: dict[str, list[Question]] = defaultdict(list)
    for row in questions:
        by_id[row["question_id"]].append(row)
    there = stage.chunks()
    for number, first in enumerate(range(0, len(order), prompts_per_chunk)):
        ids = order[first : first + prompts_per_chunk]
        chunk, rows = f"{number:05d}", table(Question, [row for one in ids for row in by_id[one]])
        if chunk not in there or not stage.read_chunk(chunk).equals(rows):
            stage.write(chunk, rows)
        there.discard(chunk)
    if there:  # of an attempt that broke off, when the source held more
        stage.forget([f"{chunk}.parquet" for chunk in there])
    stage.finish({"questions": len(order), "rows": len(questions), **record})
