"""What the vote is worth beside each language alone, and where it can be trusted. Gold answers only report.

Q questions, L languages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_ray.evaluation.tables import percent
from calm_ray.methods.calm.voting import Ballots, Election
from calm_ray.methods.shared.audit import (
    CALIBRATED,
    RAW,
    TARGET,
    VOTE,
    WITHOUT,
    Floats,
    audit_report,
    count_answers,
    count_sources,
    print_audit,
    worth_of,
)
from calm_ray.prompts.extraction import NO_ANSWER, Ints

BINS = 10
"""Agreement is binned by tenths."""
PREFIX = "audit/"
"""Of the keys of the counts."""


def _mean(own: Floats) -> Floats:
    """The vote of distributions [L, Q, K], where each completion counts equally."""
    return np.asarray(own.mean(axis=0))


def count_audit(ballots: Ballots, election: Election, right: Ints) -> Counter[str]:
    """Counts a chunk for `audit_of`; `right` [Q] are the gold answers, NO_ANSWER if unknown.

    A letter's frequency in each language, which calibration divides by, is that within the chunk.
    """
    languages, together = ballots.languages, election.together
    counted = election.alone.counts.reshape(len(ballots.questions), len(languages), -1).transpose(1, 0, 2)
    own = counted / np.maximum(counted.sum(axis=2, keepdims=True), 1)
    calibrated = own / np.maximum(own.mean(axis=1, keepdims=True), 1e-9)
    counts = count_sources(own, right, languages, RAW, {VOTE: _mean})
    counts.update(count_sources(calibrated, right, languages, CALIBRATED, {VOTE: _mean}))
    counts.update(count_answers(TARGET, together.counts.astype(np.float64), own, right, together.winner))
    bins = np.minimum((together.agreement * BINS).astype(np.int64), BINS - 1)
    known = (right != NO_ANSWER) & (together.winner != NO_ANSWER)
    for name, rows in (("known", known), ("right", known & (together.winner == right))):
        for number, count in enumerate(np.bincount(bins[rows], minlength=BINS)):
            counts[f"{name}_at/{number}"] = int(count)
    return Counter({f"{PREFIX}{key}": value for key, value in counts.items()})


def audit_of(counts: Mapping[str, float]) -> dict[str, Any]:
    """Returns what `count_audit` counted over all chunks.

    `report` and `target` are as in `calm_ray.methods.shared.audit`. `by_agreement` has, for each tenth, how many
    questions the vote decided with at least this agreement, as a fraction of those with a gold answer, and how often
    it was right in them; None without gold answers.
    """
    own = Counter({key.removeprefix(PREFIX): value for key, value in counts.items() if key.startswith(PREFIX)})
    known = own[f"{TARGET}/known"]
    by_agreement = None
    if known:
        decided, right = (
            [sum(own[f"{name}_at/{n}"] for n in range(first, BINS)) for first in range(BINS)]
            for name in ("known", "right")
        )
        by_agreement = {
            str(tenth / BINS): {"questions": decided[tenth] / known, "accuracy": right[tenth] / decided[tenth]}
            for tenth in range(BINS)
            if decided[tenth]
        }
    return {"report": audit_report(own), TARGET: worth_of(own, TARGET), "by_agreement": by_agreement}


def print_vote_audit(audit: Mapping[str, Any], languages: list[str]) -> None:
    """Prints what the vote is worth, and warns if a single language is better."""

    def advice(kind: str, name: str) -> str:
        _, without, left_out = name.partition(WITHOUT)
        best = max(audit["report"][kind][code]["accuracy"] for code in languages)
        surer = [(least, at) for least, at in audit["by_agreement"].items() if at["accuracy"] > best]
        found = []
        if without:
            found.append(f"leaving {left_out} out of languages")
        if surer:
            least, at = surer[0]
            found.append(
                f"preferences.min_agreement={least}, with which the vote decides {percent(at['questions'])} percent of "
                f"the questions and is right in {percent(at['accuracy'])} of them"
            )
        return f"Consider {' or '.join(found)}" if found else "The languages know too different things for a vote"

    print_audit(audit["report"], audit[TARGET], languages, advice)
