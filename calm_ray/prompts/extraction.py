"""Answers by number: columns of completions in, the numbers of their letters out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.questions import LETTERS
from calm_ray.prompts.released import RELEASED_LETTERS, released_answers

Ints = NDArray[np.int64]
NOBODY = -1
"""Stands for an answer that cannot be read, and for a vote without a winner."""


def letter_index(answer: str | None) -> int:
    """The number of a letter, from 0; NOBODY for None."""
    return NOBODY if answer is None else LETTERS.index(answer)


def letter(index: Any) -> str | None:
    """The letter of a number; None for NOBODY."""
    return None if index == NOBODY else LETTERS[int(index)]


def _strict(texts: pa.Array, language: str, choices: Callable[[int], Sequence[str]]) -> Ints:
    answers = []
    for row, text in enumerate(texts.to_pylist()):
        options = choices(row)
        answers.append(letter_index(extract_answer(text, language, LETTERS[: len(options)], options)))
    return np.array(answers, dtype=np.int64)


def _released(texts: pa.Array, language: str, choices: Callable[[int], Sequence[str]]) -> Ints:
    answers = pc.index_in(released_answers(texts, language), RELEASED_LETTERS)
    return pc.fill_null(answers, NOBODY).to_numpy().astype(np.int64)


EXTRACTORS: dict[str, Callable[[pa.Array, str, Callable[[int], Sequence[str]]], Ints]] = {
    "strict": _strict,
    "released": _released,
}
"""What `preferences.extraction` may say: (texts [n] of a language, the choices of a text's question) -> letters [n].

Letters beyond a question's choices are for the caller to refuse.
"""


def read_answers(extraction: str, texts: Sequence[str], language: str, choices: Sequence[str]) -> list[str | None]:
    """The answers of completions to one question: letters of its choices, None for what cannot be read."""
    if not choices:
        return [None] * len(texts)
    numbers = EXTRACTORS[extraction](pa.array(texts, pa.string()), language, lambda row: choices)
    return [letter(number) if number < len(choices) else None for number in numbers.tolist()]
