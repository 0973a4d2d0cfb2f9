"""The figures of scored candidates of a run, counted chunk by chunk in Ray Data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calm_ray.cluster.over_chunks import count_over
from calm_ray.core.sections import Dco
from calm_ray.evaluation.score_report import count_distance, count_scores, distance_report, score_report
from calm_ray.evaluation.scores import Scores, chunks_of, columns_for, read_scored, scores_of
from calm_ray.methods.dco.gamma import gammas, optimal_logps
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class ScoreCounter:
    """Counts what a policy's scores say."""

    scored: Stage
    languages: list[str]
    convention: str

    def count(self, chunk: str) -> Counter[str]:
        return count_scores(self.read(self.scored, chunk))

    def read(self, stage: Stage, chunk: str) -> Scores:
        return scores_of(read_scored(stage, chunk, self.languages, columns_for(self.convention)), self.convention)

    def report(self) -> dict[str, Any]:
        return score_report(count_over(self.count, chunks_of(self.scored)))


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


def answers_of(stage: Stage, convention: str | None) -> dict[tuple[str, str], str | None]:
    """(language, question_id) -> what a policy answered: the candidate it finds likeliest, or what it wrote."""
    if not stage.chunks():
        return {}
    if convention is None:
        data = stage.read(["language", "question_id", "answer"]).to_pydict()
        return dict(zip(zip(data["language"], data["question_id"], strict=True), data["answer"], strict=True))
    found: dict[tuple[str, str], str | None] = {}
    for chunk in sorted(stage.chunks()):
        language = chunk.rpartition("-")[2]
        scores = scores_of({language: stage.read_chunk(chunk, columns_for(convention))}, convention)
        found |= {(language, q): str(a) for q, a in zip(scores.questions, scores.answers[0], strict=True)}
    return found


def changed_answers(
    now: Mapping[tuple[str, str], str | None], before: Mapping[tuple[str, str], str | None]
) -> dict[str, float]:
    """The share of a language's questions that are answered otherwise than before (DCO, section 6.4)."""
    asked: Counter[str] = Counter(language for language, _ in now)
    changed = Counter(key[0] for key, answer in now.items() if answer != before.get(key))
    return {language: changed[language] / count for language, count in asked.items()}
