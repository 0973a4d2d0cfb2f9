"""The rules behind CALM's published pairs, reconstructed from their code (wangym2/CALM, 1b24db8) and files.

Functions take columns of texts, because they parse millions of completions at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from calm_ray.core.languages import LANGUAGES, language_code

RELEASED_LETTERS = pa.array(list("ABCDE"))
"""The letters that the published code reads."""


@dataclass(frozen=True)
class Form:
    """The format of one language's completions and prompts in the published files."""

    answers: tuple[str, ...]
    """Markers before the answer; any of them counts."""
    explanation: str
    """Prefix of a chosen side."""
    answer: str
    """Precedes the option at the end of a chosen side."""
    before: str = ""
    after: str = ""
    """`before` and `after` surround the question in a training prompt."""
    cut: tuple[str, ...] = ()
    """Suffixes of the question that a training prompt drops."""


_FORMS = {
    "en": Form(("Answer:",), "Explanation: ", "Answer:", before="Question:"),
    "zh": Form(("答案:", "答案："), "解释: ", "答案:", before="问题:", after="\n"),
    "fr": Form(("Réponse:", "Réponse :"), "Explication: ", "Réponse:", before="Question:", after="\nRéponse:"),
    "de": Form(("Antwort:",), "Erklärung: ", "Antwort:", before="Frage:", after="\nAntwort:"),
    "it": Form(("Risposta:",), "Spiegazione: ", "Risposta:", cut=("\nRisposta:", "\nAnswer:")),
    "ja": Form(("答え:", "答え："), "説明: ", "答え:", cut=("\n答え:",)),
}


@cache
def form(language: str) -> Form:
    """Returns a language's published form, or `own_form` for languages that were not published."""
    return _FORMS.get(language_code(language) or language) or own_form(language)


@cache
def own_form(language: str) -> Form:
    """Returns the form that calm_ray itself requests in a language."""
    row = LANGUAGES[language_code(language) or language]
    markers = tuple(f"{row.answer_word}{colon}" for colon in (":", "：", " :"))
    return Form(markers, row.explanation + row.space, row.answer + row.space)


def _before_marker(texts: pa.Array, marker: str) -> pa.Array:
    """Returns the part of each text before the last marker; the whole text if it has none."""
    parts = pc.split_pattern(texts, marker, max_splits=1, reverse=True)
    return parts.values.take(pa.array(parts.offsets.to_numpy()[:-1]))


def _after_marker(texts: pa.Array, marker: str) -> pa.Array:
    """Returns the part after the last marker; the whole text if it has none. Does not copy the long part before it."""
    parts = pc.split_pattern(texts, marker, max_splits=1, reverse=True)
    return parts.values.take(pa.array(parts.offsets.to_numpy()[1:] - 1))


def released_answers(texts: pa.Array, language: str) -> pa.Array:
    """Returns what the published parser reads from each completion: usually a letter, null if it reads nothing.

    It takes the text after the last marker, or the whole text without one. A single character is the answer whatever it
    is; otherwise the second character if it is A to E, else the first if it is.
    """
    after = texts
    for marker in form(language).answers:
        after = _after_marker(after, marker)
    after = pc.utf8_trim_whitespace(after)
    first, second = pc.utf8_slice_codeunits(after, 0, 1), pc.utf8_slice_codeunits(after, 1, 2)
    first_letter, second_letter = (pc.if_else(pc.is_in(part, RELEASED_LETTERS), part, None) for part in (first, second))
    single = pc.if_else(pc.equal(first, ""), None, first)
    return pc.if_else(pc.equal(second, ""), single, pc.coalesce(second_letter, first_letter))


def explanations(texts: pa.Array, language: str) -> pa.Array:
    """Strips the answer line and the leading "Explanation:" from each completion."""
    before = texts
    for marker in form(language).answers:
        before = _before_marker(before, marker)
    label = form(language).explanation.rstrip(" :：")
    explanation = pc.replace_substring_regex(before, rf"^\s*{label}\s*[:：]", "", max_replacements=1)
    return pc.utf8_trim_whitespace(explanation)


def training_prompts(questions: pa.Array, language: str) -> pa.Array:
    """Formats questions as in the published training prompts."""
    rules = form(language)
    for ending in rules.cut:
        questions = pc.replace_substring_regex(questions, rf"{re.escape(ending)}\z", "")
    return pc.binary_join_element_wise(rules.before, questions, rules.after, "")
