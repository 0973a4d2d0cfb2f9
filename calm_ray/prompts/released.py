"""The rules that CALM's published pairs were made by, as their code (wangym2/CALM, 1b24db8) and files show them.

Columns of texts go in, since millions of completions are read at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from calm_ray.core.languages import LANGUAGES, language_code

RELEASED_LETTERS = pa.array(list("ABCDE"))
"""All that the published code reads."""


@dataclass(frozen=True)
class Form:
    """How one language's completions and prompts look in the published files."""

    answers: tuple[str, ...]
    """Any of these comes before the answer."""
    explanation: str
    """What a chosen side begins with."""
    answer: str
    """What stands before the option at the end of a chosen side."""
    before: str = ""
    after: str = ""
    """What a training prompt has around the question."""
    cut: tuple[str, ...] = ()
    """What a training prompt leaves out at the question's end."""


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
    """The published form of a language; of one that was not published, its row of the language table."""
    return _FORMS.get(language_code(language) or language) or own_form(language)


@cache
def own_form(language: str) -> Form:
    """The form that calm_ray itself asks for in a language."""
    row = LANGUAGES[language_code(language) or language]
    markers = tuple(f"{row.answer_word}{colon}" for colon in (":", "：", " :"))
    return Form(markers, row.explanation + row.space, row.answer + row.space)


def _before_marker(texts: pa.Array, marker: str) -> pa.Array:
    """What stands before the last marker in each text; the whole text where it has none."""
    parts = pc.split_pattern(texts, marker, max_splits=1, reverse=True)
    return parts.values.take(pa.array(parts.offsets.to_numpy()[:-1]))


def _after_marker(texts: pa.Array, marker: str) -> pa.Array:
    """What stands after it; the whole text where it has none. What stands before it, mostly long, is not copied."""
    parts = pc.split_pattern(texts, marker, max_splits=1, reverse=True)
    return parts.values.take(pa.array(parts.offsets.to_numpy()[1:] - 1))


def released_answers(texts: pa.Array, language: str) -> pa.Array:
    """What the published parser reads from each completion: mostly a letter, null where it reads nothing.

    Of what stands after the last marker, or of the whole text where there is none: a single character is the answer
    whatever it is; else the second character counts if it is one of A to E, else the first.
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
    """Each completion without its answer line and its leading "Explanation:"."""
    before = texts
    for marker in form(language).answers:
        before = _before_marker(before, marker)
    label = form(language).explanation.rstrip(" :：")
    said = pc.replace_substring_regex(before, rf"^\s*{label}\s*[:：]", "", max_replacements=1)
    return pc.utf8_trim_whitespace(said)


def training_prompts(questions: pa.Array, language: str) -> pa.Array:
    """Questions as the published training prompts have them."""
    rules = form(language)
    for ending in rules.cut:
        questions = pc.replace_substring_regex(questions, rf"{re.escape(ending)}\z", "")
    return pc.binary_join_element_wise(rules.before, questions, rules.after, "")
