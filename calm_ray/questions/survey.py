"""Counts what a source of questions contains, in one pass and without keeping its texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.rows import Question
from calm_ray.questions.formats import format_named
from calm_ray.questions.parallel import Index, Problem, refusal
from calm_ray.questions.reader import Row, read

LISTED = 1_000
"""Maximum number of problems kept individually; the counts cover all."""


@dataclass
class LanguageCount:
    """Counts of the usable rows in one language."""

    questions: int = 0
    min_choices: int = 0
    max_choices: int = 0
    with_gold: int = 0
    duplicates: int = 0
    """Rows with the text and choices of an earlier row under another id."""
    missing: int = 0
    """Questions that only other languages have."""


@dataclass
class Survey:
    source: str
    format: str | None = None
    files: list[str] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    """Usable rows; excludes rows that contradict another language."""
    repaired: Counter[str] = field(default_factory=Counter)
    """How often each flaw was repaired or tolerated."""
    refused: Counter[str] = field(default_factory=Counter)
    """How often rows were refused, by reason."""
    languages: dict[str, LanguageCount] = field(default_factory=dict)
    first: list[Question] = field(default_factory=list)
    """The first ten usable rows."""
    notes: list[Problem] = field(default_factory=list)
    """The first 1,000 repairs and remarks."""
    bad_rows: list[Problem] = field(default_factory=list)
    """The first 1,000 refused rows."""

    def as_json(self) -> dict[str, object]:
        """Plain types, for `json.dumps`."""
        return {**asdict(self), "repaired": dict(self.repaired), "refused": dict(self.refused)}

    def refusal(self) -> InputError | None:
        """The error to raise for bad rows; None if there are none."""
        return refusal(self.bad_rows, self.refused.total()) if self.refused else None

    def note(self, row: Row) -> None:
        self.repaired.update(row.notes)
        room = max(0, LISTED - len(self.notes))
        self.notes += [Problem(row.part.name, row.number, reason) for reason in row.notes[:room]]

    def refuse(self, problem: Problem, reason: str) -> None:
        self.refused[reason] += 1
        if len(self.bad_rows) < LISTED:
            self.bad_rows.append(problem)


def survey(source: str, *, format: str | None = None, language: str | None = None) -> Survey:
    """Reads all of a source (see `open_source`) and counts what it contains. Counts bad rows instead of raising."""
    return survey_rows(source, read(source, format=format, language=language))


def survey_rows(source: str, rows: Iterable[Row]) -> Survey:
    """Surveys rows as they are read."""
    found, index = Survey(source), Index()
    texts: dict[str, set[int]] = defaultdict(set)
    duplicates: Counter[str] = Counter()
    files: dict[str, None] = {}
    for row in rows:
        found.rows += 1
        found.format = row.part.format or found.format
        files[row.part.name] = None
        if row.notes:
            found.note(row)
        try:
            question = row.question
            index.add(question["question_id"], question["language"], row.seen(question))
        except BadRow as bad:
            found.refuse(row.problem(bad), bad.reason)
            continue
        if len(found.first) < 10:
            found.first.append(question)
        content = hash((question["text"], *question["choices"]))
        duplicates[question["language"]] += content in texts[question["language"]]
        texts[question["language"]].add(content)
    found.files = list(files)
    _compare_languages(found, index, duplicates)
    return found


def _compare_languages(found: Survey, index: Index, duplicates: Counter[str]) -> None:
    codes = list(index.counts())
    for flaw in list(index.conflicts()):
        found.refuse(flaw.problem, flaw.bad.reason)
        del index.questions[flaw.question_id][flaw.language]
    found.kept = found.rows - found.refused.total()
    found.languages = {code: LanguageCount(duplicates=duplicates[code]) for code in codes}
    for rows in index.questions.values():
        for code, seen in rows.items():
            count = found.languages[code]
            count.questions += 1
            count.min_choices = min(count.min_choices or seen.choices, seen.choices)
            count.max_choices = max(count.max_choices, seen.choices)
            count.with_gold += seen.gold is not None
    if found.format is not None and format_named(found.format).parallel:
        for count in found.languages.values():
            count.missing = len(index.questions) - count.questions
