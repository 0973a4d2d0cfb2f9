"""Calibration of candidates: how likely each one is in the mean, by language and subject. No gold answer is used.

Pure functions over the columns of one chunk of scored candidates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from calm_ray.evaluation.scores import Scores, Tables

Means = dict[str, dict[str, dict[str, float]]]
"""Mean log-probability (nats) of each candidate, by language, subject ("" if it has none) and the candidate's text."""
PRIOR = 1.0
"""Questions that the mean of a subject counts for, beside those that a candidate stands in."""
COLUMNS = ["question_id", "subject", "choices", "logps", "right"]
"""The columns of `Scored` that calibration needs."""


def candidate_sums(scored: Tables) -> Counter[str]:
    """Sums and counts of one chunk for `means_of`."""
    sums: Counter[str] = Counter()
    for language, data in scored.items():
        logps = iter(data["logps"].combine_chunks().flatten().to_pylist())
        for subject, choices in _rows(data):
            for choice, logp in zip(choices, logps, strict=False):
                sums[json.dumps([language, subject, choice, "sum"])] += logp
                sums[json.dumps([language, subject, choice, "count"])] += 1
    return sums


def means_of(sums: Mapping[str, float], prior: float = PRIOR) -> Means:
    """Returns the means of all chunks, from their added sums and counts.

    The mean of a few questions is noisy and holds what is to be learned from each of them, so it is shrunk toward the
    mean of the subject's candidates, as if every candidate had stood in `prior` more questions with that mean.
    """
    totals: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for key, total in sums.items():
        language, subject, choice, kind = json.loads(key)
        if kind == "sum":
            count = sums[json.dumps([language, subject, choice, "count"])]
            totals.setdefault((language, subject), {})[choice] = total, count
    means: Means = {}
    for (language, subject), found in totals.items():
        middle = sum(total for total, _ in found.values()) / sum(count for _, count in found.values())
        means.setdefault(language, {})[subject] = {
            choice: (total + prior * middle) / (count + prior) for choice, (total, count) in found.items()
        }
    return means


def mean_recurrence(sums: Mapping[str, float]) -> float:
    """Returns how many questions a candidate stands in, in the mean over candidates, languages and subjects."""
    counts = [count for key, count in sums.items() if json.loads(key)[3] == "count"]
    return sum(counts) / len(counts) if counts else 0.0


def calibrated(scores: Scores, scored: Tables, means: Means) -> Scores:
    """Subtracts every candidate's mean from its log-probability.

    A candidate without a mean, which only held-out questions have, takes that of its subject's other candidates.
    """
    offsets = np.zeros_like(scores.logps)
    filled = np.arange(offsets.shape[2]) < scores.counts[:, None]
    for i, language in enumerate(scores.languages):
        data, known = scored[language].take(pa.array(scores.places[i])), means.get(language, {})
        offsets[i][filled] = [
            value for subject, choices in _rows(data) for value in _offsets(known.get(subject, {}), choices)
        ]
    return replace(scores, logps=scores.logps - offsets)


def _offsets(known: Mapping[str, float], choices: list[str]) -> list[float]:
    other = sum(known.values()) / len(known) if known else 0.0
    return [known.get(choice, other) for choice in choices]


def _rows(data: pa.Table) -> Iterator[tuple[str, list[str]]]:
    for subject, choices in zip(data["subject"].to_pylist(), data["choices"].to_pylist(), strict=True):
        yield subject or "", choices
