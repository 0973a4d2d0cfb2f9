"""Checks across rows: ids are unique, and languages hold the same questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from calm_ray.core.errors import BadRow, InputError

SHOWN = 20
"""Maximum number of bad rows listed in an error message."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A repair made to a row, or why the row cannot be used."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


class Seen(NamedTuple):
    """What is kept of a question in one language."""

    file: str
    row: int
    choices: int
    gold: str | None

    def where(self, other: str) -> str:
        """The location of this row, for a message about a row of the file `other`."""
        return f"row {self.row}" if self.file == other else f"{self.file}, row {self.row}"


class Flaw(NamedTuple):
    """A question that is inconsistent or incomplete across languages, and the row to report."""

    question_id: str
    language: str
    seen: Seen
    bad: BadRow

    @property
    def problem(self) -> Problem:
        return Problem(self.seen.file, self.seen.row, str(self.bad))


class Index:
    """The questions of a source by id and language, without their texts."""

    def __init__(self) -> None:
        self.questions: dict[str, dict[str, Seen]] = {}

    def add(self, question_id: str, language: str, seen: Seen) -> None:
        """Raises BadRow for a duplicate in the same language."""
        rows = self.questions.setdefault(question_id, {})
        if language in rows:
            first = rows[language].where(seen.file)
            raise BadRow("duplicate question", f"{question_id!r} in {language!r} is already in {first}")
        rows[language] = seen

    def conflicts(self) -> Iterator[Flaw]:
        """Yields rows whose number of choices or gold letter differs from an earlier language of the question."""
        for question_id, rows in self.questions.items():
            first_code, first = next(iter(rows.items()))
            gold_code, gold = next(((code, row) for code, row in rows.items() if row.gold), (first_code, first))
            for code, row in rows.items():
                if row.choices != first.choices:
                    detail = f"question {question_id!r} has {row.choices} choices in {code!r}, but {first.choices} in "
                    detail += f"{first_code!r} ({first.where(row.file)})"
                    yield Flaw(question_id, code, row, BadRow("number of choices differs between languages", detail))
                elif row.gold is not None and row.gold != gold.gold:
                    detail = f"question {question_id!r} has gold {row.gold!r} in {code!r}, but {gold.gold!r} in "
                    detail += f"{gold_code!r} ({gold.where(row.file)}); choices must be parallel"
                    yield Flaw(question_id, code, row, BadRow("gold letter differs between languages", detail))

    def gaps(self, languages: Sequence[str], needs_gold: bool) -> Iterator[Flaw]:
        """Yields questions missing in some of `languages` or, with `needs_gold`, without a gold letter in any."""
        for question_id, rows in self.questions.items():
            code, seen = next(iter(rows.items()))
            if missing := [other for other in languages if other not in rows]:
                detail = f"question {question_id!r} is missing in {', '.join(missing)}; add it, or remove the language "
                yield Flaw(question_id, code, seen, BadRow("missing in some languages", detail + "from `languages`"))
            elif needs_gold and not any(row.gold for row in rows.values()):
                detail = f"question {question_id!r} has no gold letter in any language"
                yield Flaw(question_id, code, seen, BadRow("field 'gold' is missing", detail))

    def counts(self) -> Counter[str]:
        """Number of questions per language."""
        return Counter(code for rows in self.questions.values() for code in rows)


BAD_ROWS = "bad_rows.jsonl"
"""Lists the dropped rows, in a run and next to exported pairs."""


def as_lines(problems: Sequence[Problem]) -> bytes:
    """The content of `BAD_ROWS`: one JSON line per problem."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems).encode()


def refusal(bad: Sequence[Problem], count: int) -> InputError:
    """An error that lists the first of `count` bad rows."""
    lines = [str(problem) for problem in bad[:SHOWN]]
    if count > len(lines):
        lines.append(f"and {count - len(lines)} more")
    lines.append("fix these rows, or skip bad rows with --on-bad-row skip (questions.on_bad_row: skip in a recipe)")
    return InputError("\n".join(lines))
