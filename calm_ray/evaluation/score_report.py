"""Metrics of scored candidates: accuracy, RankC, agreement, entropy. Counts of chunks can be summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from math import comb, sqrt
from typing import Any

import numpy as np

from calm_ray.evaluation.metrics import ac3
from calm_ray.evaluation.ranking import Ints, entropies, rankc, ranks_of
from calm_ray.evaluation.scores import Scores

ENGLISH = "en"


def count_scores(scores: Scores) -> Counter[str]:
    """Returns the counts of one chunk for `score_report`. Keys are `name`, or `name/` and a language, pair or size."""
    counts: Counter[str] = Counter()
    ranks, answers = ranks_of(scores.scores), scores.answers
    known = scores.right >= 0
    is_right = known & (answers == scores.right)
    counts["questions"], counts["known"] = len(scores.questions), int(known.sum())
    entropy = entropies(scores.logps)
    for i, language in enumerate(scores.languages):
        counts[f"right/{language}"] = int(is_right[i].sum())
        for name, rows in (("right", is_right[i]), ("wrong", known & ~is_right[i])):
            values = entropy[i, rows]
            for part, value in (("count", len(values)), ("sum", values.sum()), ("squares", (values**2).sum())):
                counts[f"entropy_{name}_{part}/{language}"] = value
    for i, j in combinations(range(len(scores.languages)), 2):
        pair = f"{scores.languages[i]}-{scores.languages[j]}"
        same, either = answers[i] == answers[j], is_right[i] | is_right[j]
        counts[f"rankc/{pair}"] = rankc(ranks[i], ranks[j], scores.counts).sum()
        counts[f"top1/{pair}"] = int(same.sum())
        counts[f"either_right/{pair}"], counts[f"both_right/{pair}"] = int(either.sum()), int((same & either).sum())
    for size in range(2, len(scores.languages) + 1):
        counts[f"alike/{size}"] = _agreeing(answers, size, scores.logps.shape[2])
    return counts


def _agreeing(answers: Ints, size: int, candidates: int) -> int:
    """Number of groups of `size` languages with the same answer, over all questions; `answers` [L, Q]."""
    ways = np.array([comb(count, size) for count in range(len(answers) + 1)])
    same = [(answers == candidate).sum(axis=0) for candidate in range(candidates)]
    return int(ways[np.array(same)].sum())


def score_report(counts: Mapping[str, float]) -> dict[str, Any]:
    """Returns one policy's metrics: fractions from 0 to 1, entropies in nats. Empty if there are no questions.

    `rankc` and `top1_right` are per language pair; `rankc_mean` averages over all pairs, `rankc_en` over pairs with
    English (CLC_all in DCO's tables). `top1` is how often two languages give the same answer, over all pairs;
    `top1_right` is the same among questions that at least one of the two answers correctly. `entropy` is that of the
    distribution over candidates, separately for right and wrong answers (DCO, section 6.5). Metrics that need gold
    answers are omitted without them.
    """
    if not (questions := counts["questions"]):
        return {}
    pairs = _by_name(counts, "rankc")
    by_pair = {pair: value / questions for pair, value in pairs.items()}
    with_english = [value for pair, value in by_pair.items() if ENGLISH in pair.split("-")]
    languages = len(_by_name(counts, "right"))
    consistency = {size: n / comb(languages, int(size)) / questions for size, n in _by_name(counts, "alike").items()}
    report: dict[str, Any] = {
        "rankc": by_pair,
        "rankc_mean": _mean(by_pair.values()),
        "rankc_en": _mean(with_english),
        "top1": _mean(value / questions for value in _by_name(counts, "top1").values()),
        "consistency": consistency,
        "unparseable": 0.0,
    }
    if known := counts["known"]:
        accuracy = {code: value / known for code, value in _by_name(counts, "right").items()}
        mean = sum(accuracy.values()) / len(accuracy)
        either = _by_name(counts, "either_right")
        both = _by_name(counts, "both_right")
        report |= {
            "accuracy": accuracy,
            "accuracy_mean": mean,
            "accuracy_others": _mean(value for code, value in accuracy.items() if code != ENGLISH),
            "ac3": {size: ac3(mean, value) for size, value in consistency.items()},
            "top1_right": {pair: both[pair] / count if count else None for pair, count in either.items()},
            "entropy": {name: _entropy(counts, name) for name in ("right", "wrong")},
        }
    return report


def _by_name(counts: Mapping[str, float], name: str) -> dict[str, float]:
    return {key.partition("/")[2]: value for key, value in counts.items() if key.startswith(f"{name}/")}


def _mean(values: Any) -> float | None:
    listed = list(values)
    return float(sum(listed) / len(listed)) if listed else None


def _entropy(counts: Mapping[str, float], name: str) -> dict[str, float | None]:
    """Mean and standard deviation over all languages' answers."""
    count, total, squares = (
        sum(_by_name(counts, f"entropy_{name}_{part}").values()) for part in ("count", "sum", "squares")
    )
    if not count:
        return {"mean": None, "deviation": None}
    mean = total / count
    return {"mean": mean, "deviation": sqrt(max(0.0, squares / count - mean**2))}


def count_distance(policy: Scores, optimal: Scores, beta: float) -> Counter[str]:
    """Counts a policy's distance from the optimal one in one chunk: how often their answers match, and beta |difference
    of their margins|, which is |beta margin - target|, over all pairs of candidates, in nats."""
    counts: Counter[str] = Counter()
    counts["answers"] = policy.answers.size
    counts["answers_as_optimal"] = int((policy.answers == optimal.answers).sum())
    for first, second in combinations(range(policy.logps.shape[2]), 2):
        rows = policy.counts > second
        margins, wanted = (one.logps[:, rows, first] - one.logps[:, rows, second] for one in (policy, optimal))
        counts["margins"] += margins.size
        counts["margin_distance"] += beta * np.abs(margins - wanted).sum()
    return counts


def distance_report(counts: Mapping[str, float]) -> dict[str, float]:
    """Fraction of answers that match the optimal policy's, and mean |beta margin - target| in nats."""
    return {
        "top1_with_optimal": counts["answers_as_optimal"] / max(1, counts["answers"]),
        "margin_distance": counts["margin_distance"] / max(1, counts["margins"]),
    }
