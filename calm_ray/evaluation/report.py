"""Metrics of a policy's answers to held-out questions: a round's entry in summary.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from calm_ray.core.rows import Prediction
from calm_ray.evaluation.metrics import ac3, accuracy, consistency, unparseable


def evaluation_report(predictions: Iterable[Prediction], gold: Mapping[str, str]) -> dict[str, Any]:
    """Returns one policy's accuracy, Consistency_s and AC3_s for s = 2 ... L, and fraction of unparseable answers."""
    answers: dict[str, dict[str, str | None]] = defaultdict(dict)
    for row in predictions:
        answers[row["language"]][row["question_id"]] = row["answer"]
    by_language = {language: accuracy(of_language, gold) for language, of_language in answers.items()}
    mean = sum(by_language.values()) / len(by_language)
    consistencies = {str(size): consistency(answers, size) for size in range(2, len(answers) + 1)}
    return {
        "accuracy": by_language,
        "accuracy_mean": mean,
        "consistency": consistencies,
        "ac3": {size: ac3(mean, value) for size, value in consistencies.items()},
        "unparseable": unparseable(answers),
    }
