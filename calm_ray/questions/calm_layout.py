"""Parses the layout of the CALM repository, which puts a question and its options into one text.

Options are on separate lines (`A. town`) or in parentheses (`(A) town (B) ...`); machine translation turned some of
the letters in parentheses into lowercase, full width or Chinese numerals.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice

from calm_ray.core.errors import BadRow
from calm_ray.core.languages import LANGUAGES
from calm_ray.prompts.questions import LETTERS

Note = Callable[[str], None]

_NUMERALS = "一二三四五六七八九十"
_LINE = re.compile(r"^[ \t]*([A-Z])[.．、]", re.MULTILINE)
_PARENTHESES = re.compile(rf"[(（]\s*([A-Za-z{_NUMERALS}])\s*[)）]")
_GOLD = re.compile(rf"\s*(?:([A-Za-z])\s*(?:$|[.．、:：)）])|{_PARENTHESES.pattern})")
_QUESTION_WORDS = (
    "Question|Frage|Domanda|Pregunta|Pergunta|Vraag|Pytanie|Câu hỏi|Swali|Soru|Вопрос|"
    "प्रश्न|질문|سؤال|السؤال|问题|质问|質問|問題"
)
_QUESTION_PREFIX = re.compile(rf"\s*(?:{_QUESTION_WORDS})\s*[:：]\s*")
_MAX_MARKS = 1_000  # more cannot be options, and `_options` takes quadratic time
_ANSWER_WORDS = "|".join(re.escape(row.answer_word) for row in LANGUAGES.values())
_ANSWER_CUE = re.compile(rf"\s*(?:{_ANSWER_WORDS}|[^\s:：]{{1,20}})\s?[:：]\s*")


def read_input(text: str, note: Note) -> tuple[str, list[str]]:
    """Returns the bare question and its options. Raises BadRow unless at least two consecutive options are found."""
    marks = max((_options(pattern, text) for pattern in (_LINE, _PARENTHESES)), key=len)
    if len(marks) < 2:
        raise BadRow("no options found", "neither lines `A. ...` nor `(A) ...`")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    choices = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    choices[-1] = _without_answer_cue(choices[-1])
    if any(mark[0].strip()[0] == "（" or mark[1] not in LETTERS for mark in marks):
        note("an option letter was lowercase, a Chinese numeral or in full-width parentheses")
    question = text[: marks[0].start()]
    while (prefix := _QUESTION_PREFIX.match(question)) is not None:
        question = question[prefix.end() :]
    return question.strip(), choices


def read_gold(output: str, choices: list[str], note: Note) -> str | None:
    """The gold letter of `C`, `(D) Within 24 hours` and their corrupted forms; None, with a note, if there is none."""
    if (found := _GOLD.match(output)) is not None:
        mark = found[1] or found[2]
        if "（" in found[0]:
            note("the gold letter was in full-width parentheses")
        elif mark in _NUMERALS:
            note("the gold letter was a Chinese numeral")
        elif mark not in LETTERS:
            note("the gold letter was lowercase")
        return LETTERS[_index(mark)]
    matches = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == output.strip()]
    if len(matches) == 1:
        note("the gold letter was missing; the gold text matches one option")
        return matches[0]
    note("the gold answer is missing or matches no option; kept without a gold answer")
    return None


def _index(mark: str) -> int:
    """0 for A, a and 一, the Chinese numeral one."""
    return _NUMERALS.index(mark) if mark in _NUMERALS else LETTERS.index(mark.upper())


def _options(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The longest run of marks in the order A, B, C ...; the last one in a tie, since the question may hold a list."""
    found = list(islice(pattern.finditer(text), _MAX_MARKS))
    best: list[re.Match[str]] = []
    for start, first in enumerate(found):
        if _index(first[1]) == 0:
            run = [first]
            for mark in found[start + 1 :]:
                if _index(mark[1]) == len(run):
                    run.append(mark)
            best = max(run, best, key=len)
    return best


def _without_answer_cue(option: str) -> str:
    """Strips trailing lines that only ask for the answer (`Antwort:`) or hold a stray quote from the last option."""
    lines = option.split("\n")
    while len(lines) > 1 and (_ANSWER_CUE.fullmatch(lines[-1]) or not any(char.isalnum() for char in lines[-1])):
        lines.pop()
    return "\n".join(lines).strip()
