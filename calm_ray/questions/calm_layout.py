"""The CALM repository writes question and options into one text; this takes it apart.

Options stand one a line (`A. town`) or in brackets (`(A) town (B) ...`); a machine translation turned some of the
brackets' letters into lower case, full width or Chinese numerals.
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
_BRACKET = re.compile(rf"[(（]\s*([A-Za-z{_NUMERALS}])\s*[)）]")
_GOLD = re.compile(rf"\s*(?:([A-Za-z])\s*(?:$|[.．、:：)）])|{_BRACKET.pattern})")
_ASKS = (
    "Question|Frage|Domanda|Pregunta|Pergunta|Vraag|Pytanie|Câu hỏi|Swali|Soru|Вопрос|"
    "प्रश्न|질문|سؤال|السؤال|问题|质问|質問|問題"
)
_WRAPPER = re.compile(rf"\s*(?:{_ASKS})\s*[:：]\s*")
_MOST_MARKS = 1_000  # more are no options, and would take the square of their number in steps
_ANSWERS = "|".join(re.escape(row.answer_word) for row in LANGUAGES.values())
_MARKER = re.compile(rf"\s*(?:{_ANSWERS}|[^\s:：]{{1,20}})\s?[:：]\s*")


def read_input(text: str, note: Note) -> tuple[str, list[str]]:
    """The bare question and its options. Raises BadRow where no two options in a row are found."""
    marks = max((_options(style, text) for style in (_LINE, _BRACKET)), key=len)
    if len(marks) < 2:
        raise BadRow("no options were found", "neither lines `A. ...` nor `(A) ...`")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    choices = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    choices[-1] = _without_markers(choices[-1])
    if any(mark[0].strip()[0] == "（" or mark[1] not in LETTERS for mark in marks):
        note("an option's letter was lower case, a Chinese numeral or in full-width brackets")
    question = text[: marks[0].start()]
    while (wrapper := _WRAPPER.match(question)) is not None:
        question = question[wrapper.end() :]
    return question.strip(), choices


def read_gold(output: str, choices: list[str], note: Note) -> str | None:
    """The gold letter of `C`, `(D) Within 24 hours` and their broken forms; None (and a note) where none is found."""
    if (found := _GOLD.match(output)) is not None:
        mark = found[1] or found[2]
        if "（" in found[0]:
            note("the gold letter was in full-width brackets")
        elif mark in _NUMERALS:
            note("the gold letter was a Chinese numeral")
        elif mark not in LETTERS:
            note("the gold letter was lower case")
        return LETTERS[_place(mark)]
    same = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice == output.strip()]
    if len(same) == 1:
        note("the gold letter was missing; the gold text is that of one option")
        return same[0]
    note("the gold answer is missing or names no option; kept without one")
    return None


def _place(mark: str) -> int:
    """0 for A, a and the Chinese one."""
    return _NUMERALS.index(mark) if mark in _NUMERALS else LETTERS.index(mark.upper())


def _options(style: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The longest run of marks in the order A, B, C ...; of equal ones the last, since a question may list things."""
    found = list(islice(style.finditer(text), _MOST_MARKS))
    best: list[re.Match[str]] = []
    for start, first in enumerate(found):
        if _place(first[1]) == 0:
            run = [first]
            for mark in found[start + 1 :]:
                if _place(mark[1]) == len(run):
                    run.append(mark)
            best = max(run, best, key=len)
    return best


def _without_markers(option: str) -> str:
    """The last option without the lines after it that only ask for the answer (`Antwort:`) or hold a stray quote."""
    lines = option.split("\n")
    while len(lines) > 1 and (_MARKER.fullmatch(lines[-1]) or not any(char.isalnum() for char in lines[-1])):
        lines.pop()
    return "\n".join(lines).strip()
