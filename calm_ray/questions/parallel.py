"""What can only be checked over many rows: that ids are distinct, and that languages hold the same questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from calm_ray.core.errors import BadRow, InputError

SHOWN = 20
"""Bad rows that an error message names."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What was found in a row: a repair, or why the row cannot be used."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


class Seen(NamedTuple):
    """What is remembered of a question in one language."""

    file: str
    row: int
    choices: int
    gold: str | None

    def where(self, other: str) -> str:
        """For a message about a row of the file `other`."""
        return f"row {self.row}" if self.file == other else f"{self.file}, row {self.row}"


class Flaw(NamedTuple):
    """A question that cannot be used for what its languages say together, and the row to name for it."""

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
        """Raises BadRow where the question was there in this language."""
        same = self.questions.setdefault(question_id, {})
        if language in same:
            first = same[language].where(seen.file)
            raise BadRow("the question was there already", f"{question_id!r} in {language!r} is in {first}")
        same[language] = seen

    def conflicts(self) -> Iterator[Flaw]:
        """Rows with another number of choices, or another gold letter, than the question has in a language before."""
        for question_id, rows in self.questions.items():
            first_code, first = next(iter(rows.items()))
            gold_code, gold = next(((code, row) for code, row in rows.items() if row.gold), (first_code, first))
            for code, row in rows.items():
                if row.choices != first.choices:
                    detail = f"question {question_id!r} has {row.choices} choices in {code!r}, but {first.choices} in "
                    detail += f"{first_code!r} ({first.where(row.file)})"
                    yield Flaw(question_id, code, row, BadRow("the languages differ in choices", detail))
                elif row.gold is not None and row.gold != gold.gold:
                    detail = f"question {question_id!r} has gold {row.gold!r} in {code!r}, but {gold.gold!r} in "
                    detail += f"{gold_code!r} ({gold.where(row.file)}); choices must be parallel"
                    yield Flaw(question_id, code, row, BadRow("the languages differ in gold", detail))

    def gaps(self, languages: Sequence[str], needs_gold: bool) -> Iterator[Flaw]:
        """Questions that are not there in all of the languages or, where gold is needed, have it in none."""
        for question_id, rows in self.questions.items():
            code, seen = next(iter(rows.items()))
            if lacking := [other for other in languages if other not in rows]:
                detail = f"question {question_id!r} is not there in {', '.join(lacking)}; add it, or take the language "
                yield Flaw(question_id, code, seen, BadRow("not in all languages", detail + "out of `languages`"))
            elif needs_gold and not any(row.gold for row in rows.values()):
                detail = f"question {question_id!r} has no right letter, which evaluation needs"
                yield Flaw(question_id, code, seen, BadRow("field 'gold' is missing", detail))

    def counts(self) -> Counter[str]:
        """Questions of each language."""
        return Counter(code for rows in self.questions.values() for code in rows)


BAD_ROWS = "bad_rows.jsonl"
"""Where rows that were left out are listed, in a run and beside pairs."""


def as_lines(problems: Sequence[Problem]) -> bytes:
    """The content of `BAD_ROWS`: a line of JSON for each."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems).encode()


def refusal(bad: Sequence[Problem], count: int) -> InputError:
    """The error that names the first of `count` bad rows."""
    lines = [str(problem) for problem in bad[:SHOWN]]
    if count > len(lines):
        lines.append(f"and {count - len(lines)} more")
    lines.append("mend these rows, or leave bad rows out: --on-bad-row skip, in a recipe questions.on_bad_row: skip")
    return InputError("\n".join(lines))
