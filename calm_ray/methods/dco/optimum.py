"""The optimal policy's figures, counted chunk by chunk in Ray Data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from calm_ray.cluster.over_chunks import count_over
from calm_ray.core.sections import Dco
from calm_ray.evaluation.from_scores import ScoreCounter
from calm_ray.evaluation.score_report import count_distance, count_scores, distance_report, score_report
from calm_ray.evaluation.scores import chunks_of
from calm_ray.methods.dco.gamma import gammas, optimal_logps
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class OptimumCounter:
    """Counts what the optimal policy says that a reference leads to, and how far a policy is from it.

    Both by summed log-probabilities: the optimal policy is known but for a constant of each question, which other
    conventions would weigh differently for each candidate.
    """

    policy: ScoreCounter
    reference: Stage
    """The scores of the same candidates under the reference."""
    settings: Dco
    beta: float

    def count(self, chunk: str) -> Counter[str]:
        by_sum = replace(self.policy, convention="sum")
        reference, policy = by_sum.read(self.reference, chunk), by_sum.read(self.policy.scored, chunk)
        # A prompt that ends every engine may have been found between the two.
        reference, policy = reference.only(set(policy.questions)), policy.only(set(reference.questions))
        gamma = gammas(self.settings, self.policy.languages, self.beta)
        optimal = replace(reference, logps=optimal_logps(reference.logps, gamma, self.beta))
        counts = count_scores(optimal)
        counts.update(count_distance(policy, optimal, self.beta))
        return counts

    def report(self) -> dict[str, Any]:
        counts = count_over(self.count, chunks_of(self.reference))
        report = score_report(counts)
        return {**report, **distance_report(counts)} if report else {}
