"""Accuracy, Consistency and AC3 (CALM, section 3.1). Pure functions; all values are shares from 0 to 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb

Answers = Mapping[str, Mapping[str, str | None]]
"""language -> question_id -> answer. An answer that could not be read is None: wrong, and equal to nothing."""


def accuracy(answers: Mapping[str, str | None], gold: Mapping[str, str]) -> float:
    """Share of the questions in `gold` that are answered right; unreadable answers count as wrong."""
    return sum(answers[question_id] == right for question_id, right in gold.items()) / len(gold)


def unreadable(answers: Answers) -> float:
    """Share of all answers that could not be read."""
    total = sum(len(of_language) for of_language in answers.values())
    return sum(answer is None for of_language in answers.values() for answer in of_language.values()) / total


def consistency(answers: Answers, size: int) -> float:
    """Consistency_s: mean over all subsets of `size` languages of the share of questions they answer alike.

    A group of n languages with one answer contains C(n, s) agreeing subsets, so subsets need not be listed.
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
    """AC3_s: the harmonic mean of the languages' mean accuracy and Consistency_s; 0 where both are."""
    total = mean_accuracy + consistency_s
    return 2 * mean_accuracy * consistency_s / total if total else 0.0
