"""Accuracy, Consistency and AC3 (CALM, section 3.1). Pure functions; all values are fractions from 0 to 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Answers = Mapping[str, Mapping[str, str | None]]
"""language -> question_id -> answer. None is an unparseable answer: wrong, and equal to nothing."""


def accuracy(answers: Mapping[str, str | None], gold: Mapping[str, str]) -> float:
    """Fraction of the questions in `gold` answered correctly; unparseable answers count as wrong."""
    return sum(answers[question_id] == right for question_id, right in gold.items()) / len(gold)


def unparseable(answers: Answers) -> float:
    """Fraction of unparseable answers."""
    total = sum(len(of_language) for of_language in answers.values())
    return sum(answer is None for of_language in answers.values() for answer in of_language.values()) / total


def consistency(answers: Answers, size: int) -> float:
    """Consistency_s: the fraction of questions answered identically, averaged over all subsets of `size` languages.

    A group of n languages with the same answer contains C(n, s) agreeing subsets, so subsets are never enumerated.
    Every language must have answered the same questions; 2 <= size <= number of languages.
    """
    languages = list(answers)
    subsets = comb(len(languages), size)
    questions: Sequence[str] = list(answers[languages[0]])
    agreeing = 0
    for question_id in questions:
        groups = Counter(answers[code][question_id] for code in languages)
        agreeing += sum(comb(count, size) for answer, count in groups.items() if answer is not None)
    return agreeing / subsets / len(questions)


def ac3(mean_accuracy: float, consistency_s: float) -> float:
    """AC3_s: the harmonic mean of mean accuracy over languages and Consistency_s; 0 if both are 0."""
    total = mean_accuracy + consistency_s
    return 2 * mean_accuracy * consistency_s / total if total else 0.0


def pairwise_agreement(
    answers: NDArray[np.int64], unparseable: Literal["unequal", "dropped", "released"] = "unequal"
) -> NDArray[np.float64]:
    """[Q], fraction of language pairs that answer a question identically; `answers` [Q, L], -1 if unparseable.

    Its mean over questions that every language answers is Consistency_2, the figure in CALM's Table 1.

    `unparseable` selects how to count unparseable answers: `unequal` keeps their pairs, as disagreements; `dropped`
    drops their pairs; `released` reproduces CALM's released function (wangym2/CALM, 1b24db8,
    utils/get_consistency_score.py), which removes answers from the list it iterates over: every second of consecutive
    unparseable answers stays, and equals the others that stay.
    """
    keep = np.ones_like(answers, dtype=np.bool_)
    letters = [value for value in np.unique(answers) if value != -1]
    if unparseable == "dropped":
        keep = answers != -1
    elif unparseable == "released":
        removed = np.zeros(len(answers), dtype=np.bool_)
        for column in range(answers.shape[1]):
            removed = (answers[:, column] == -1) & ~removed
            keep[:, column] = ~removed
        letters.append(-1)
    agreeing = np.zeros(len(answers))
    for value in letters:
        same = ((answers == value) & keep).sum(axis=1)
        agreeing += same * (same - 1)
    kept = keep.sum(axis=1)
    return agreeing / np.maximum(kept * (kept - 1), 1)
