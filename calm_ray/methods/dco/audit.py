"""What a target is worth before training on it: each language alone, the vote, the product, and the target itself.

Everything is counted on the questions to train on, under the reference policy, by chunks whose counts can be added.
Gold answers, where there are any, only report. L languages, Q questions, at most K candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.scores import Scores
from calm_ray.methods.dco.gamma import Floats

RAW, CALIBRATED = "raw", "calibrated"
TARGET, VOTE, PRODUCT = "target", "vote", "product"
WITHOUT = " without "
"""As in "product without fr"."""


class Worth(TypedDict):
    """How good the answers of a source are, as fractions from 0 to 1."""

    accuracy: float | None
    """None without gold answers."""
    agreement: float
    """How often a language gives the same answer, in the mean over the languages; a language alone is compared with
    the others."""
    confidence: float
    """Mean probability of the answer. Far above the accuracy, the source is overconfident."""


Report = dict[str, dict[str, Worth]]
"""By `raw` or `calibrated`, then by source: a language, `vote`, `product`, or either without one language."""


def count_sources(scores: Scores, kind: str) -> Counter[str]:
    """Counts a chunk for `audit_report`; `kind` says whether the scores are raw or calibrated."""
    counts: Counter[str] = Counter()
    own = probabilities(scores.logps)
    answers = own.argmax(axis=2)
    for name, distribution in _sources(own, scores.languages):
        others = [i for i, code in enumerate(scores.languages) if code != name]
        counts.update(_worth(f"{kind}/{name}", distribution, answers[others], scores.right))
    for i, j in combinations(range(len(scores.languages)), 2):
        pair = f"{kind}/pair/{scores.languages[i]}-{scores.languages[j]}"
        counts[pair] = int((answers[i] == answers[j]).sum())
    counts["questions"], counts["known"] = len(scores.questions), int((scores.right >= 0).sum())
    return counts


def count_target(scores: Scores, optimal: Floats) -> Counter[str]:
    """Counts a chunk's targets: the optimal policy's log-probabilities [L, Q, K], beside the reference's scores."""
    counts: Counter[str] = Counter()
    answers = scores.logps.argmax(axis=2)
    for language, logps in zip(scores.languages, optimal, strict=True):
        counts.update(_worth(f"{TARGET}/{language}", probabilities(logps), answers, scores.right))
    counts["questions"], counts["known"] = len(scores.questions), int((scores.right >= 0).sum())
    return counts


def _sources(own: Floats, languages: Sequence[str]) -> Iterator[tuple[str, Floats]]:
    """Yields distributions [Q, K]: each language's own, then those of several languages together."""
    yield from zip(languages, own, strict=True)
    everyone = list(range(len(languages)))
    groups = {"": everyone}
    if len(languages) > 2:
        groups |= {f"{WITHOUT}{languages[i]}": [j for j in everyone if j != i] for i in everyone}
    for suffix, group in groups.items():
        with np.errstate(divide="ignore"):
            product = probabilities(np.log(own[group]).sum(axis=0))
        yield f"{PRODUCT}{suffix}", product
        yield f"{VOTE}{suffix}", _votes(own[group], product)


def _votes(own: Floats, product: Floats) -> Floats:
    """Fraction of the languages that answer each candidate [Q, K]; the product decides ties."""
    candidates = np.arange(own.shape[2])
    votes = (own.argmax(axis=2)[:, :, None] == candidates).mean(axis=0)
    return np.asarray(votes + 1e-6 * product)


def _worth(key: str, distribution: Floats, answers: NDArray[np.int64], right: NDArray[np.int64]) -> Counter[str]:
    own = distribution.argmax(axis=1)
    return Counter(
        {
            f"{key}/right": int(((right >= 0) & (own == right)).sum()),
            f"{key}/agreement": float((answers == own).mean(axis=0).sum()) if len(answers) else 0.0,
            f"{key}/confidence": float(distribution.max(axis=1).sum()),
        }
    )


def audit_report(counts: Mapping[str, float]) -> Report:
    """Returns what `count_sources` counted over all chunks."""
    report: Report = {}
    for key in counts:
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if metric == "right" and kind in (RAW, CALIBRATED):
            report.setdefault(kind, {})[name] = _worth_of(counts, f"{kind}/{name}")
    return report


def target_report(counts: Mapping[str, float], languages: Sequence[str]) -> Worth:
    """Returns what `count_target` counted over all chunks, in the mean over the languages."""
    each = [_worth_of(counts, f"{TARGET}/{language}") for language in languages]
    accuracies = [one["accuracy"] for one in each if one["accuracy"] is not None]
    return Worth(
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
        agreement=sum(one["agreement"] for one in each) / len(each),
        confidence=sum(one["confidence"] for one in each) / len(each),
    )


def _worth_of(counts: Mapping[str, float], key: str) -> Worth:
    questions, known = max(1, counts["questions"]), counts["known"]
    return Worth(
        accuracy=counts[f"{key}/right"] / known if known else None,
        agreement=counts[f"{key}/agreement"] / questions,
        confidence=counts[f"{key}/confidence"] / questions,
    )


def agreement_of(report: Report, kind: str, languages: Sequence[str]) -> dict[str, float]:
    """Returns each language's mean agreement with the others."""
    return {language: report[kind][language]["agreement"] for language in languages}


def better_sources(report: Report, target: Worth, languages: Sequence[str]) -> list[tuple[str, str, float]]:
    """Returns the sources that are right more often than the target, if a single language is: (kind, name, accuracy).

    Empty without gold answers. The best come first; of sources without one language, only the best of each kind.
    """
    if target["accuracy"] is None:
        return []
    found = [
        (kind, name, worth["accuracy"])
        for kind, sources in report.items()
        for name, worth in sources.items()
        if worth["accuracy"] is not None and worth["accuracy"] > target["accuracy"]
    ]
    if not any(name in languages for _, name, _ in found):
        return []
    return sorted(found, key=lambda one: -one[2])
