"""Parses columns of completions into columns of letter indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.option_text import named_choice
from calm_ray.prompts.questions import LETTERS
from calm_ray.prompts.released import RELEASED_LETTERS, released_answers

Ints = NDArray[np.int64]
NO_ANSWER = -1
"""Index for an unparseable answer, or for a vote without a winner."""


def letter_index(answer: str | None) -> int:
    """Returns the index of a letter, from 0; NO_ANSWER for None."""
    return NO_ANSWER if answer is None else LETTERS.index(answer)


def letter(index: Any) -> str | None:
    """Returns the letter at an index; None for NO_ANSWER."""
    return None if index == NO_ANSWER else LETTERS[int(index)]


def _strict(texts: pa.Array, language: str, choices: Callable[[int], Sequence[str]]) -> Ints:
    answers = []
    for row, text in enumerate(texts.to_pylist()):
        options = choices(row)
        answers.append(letter_index(extract_answer(text, language, LETTERS[: len(options)], options)))
    return np.array(answers, dtype=np.int64)


def _released(texts: pa.Array, language: str, choices: Callable[[int], Sequence[str]]) -> Ints:
    answers = pc.index_in(released_answers(texts, language), RELEASED_LETTERS)
    return pc.fill_null(answers, NO_ANSWER).to_numpy().astype(np.int64)


def _option_text(texts: pa.Array, language: str, choices: Callable[[int], Sequence[str]]) -> Ints:
    named = [named_choice(text, language, choices(row)) for row, text in enumerate(texts.to_pylist())]
    return np.array([NO_ANSWER if index is None else index for index in named], dtype=np.int64)


EXTRACTORS: dict[str, Callable[[pa.Array, str, Callable[[int], Sequence[str]]], Ints]] = {
    "strict": _strict,
    "released": _released,
    "option_text": _option_text,
}
"""By value of `preferences.extraction`: (texts [n], their language, row -> its question's choices) -> indices [n].

Callers must reject letters beyond a question's choices.
"""


def read_answers(extraction: str, texts: Sequence[str], language: str, choices: Sequence[str]) -> list[str | None]:
    """Returns the answers of completions to one question: letters of its choices, None if unparseable."""
    if not choices:
        return [None] * len(texts)
    indices = EXTRACTORS[extraction](pa.array(texts, pa.string()), language, lambda row: choices)
    return [letter(index) if index < len(choices) else None for index in indices.tolist()]
