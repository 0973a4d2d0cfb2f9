"""The optimal policy under a round's reference, computed without training and compared with the round's policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calm_ray.core.settings import RunSettings
from calm_ray.evaluation.from_scores import ScoreCounter
from calm_ray.evaluation.score_report import count_distance, count_scores, distance_report, score_report
from calm_ray.evaluation.scores import chunk_names, read_scored, scores_of
from calm_ray.evaluation.tables import OPTIMAL
from calm_ray.methods.base import Entry, Step
from calm_ray.methods.dco.audit_target import KEYS, AuditTarget, experts_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.gamma import Floats
from calm_ray.methods.dco.settings import Dco
from calm_ray.methods.round import Round
from calm_ray.methods.shared.evaluation import MostLikelyAnswers, ReferenceOnHeldOut
from calm_ray.methods.shared.scores import ReferenceScores, Scores, ScoringStep
from calm_ray.run.directory import RunDirectory
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class Optimum(Step):
    """Metrics of the optimal policy on training and held-out questions, and the policy's distance from it."""

    settings: RunSettings
    audit: AuditTarget
    scored: tuple[tuple[ScoringStep, ReferenceScores], ...]
    """Steps with the policy's scores and with the reference's scores of the same candidates."""

    name = OPTIMAL

    @property
    def reads(self) -> tuple[str, ...]:
        return (*(step.name for pair in self.scored for step in pair), self.audit.name)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*KEYS, "train.reference")

    @property
    def first_round(self) -> int:
        return max(policy.first_round for policy, _ in self.scored)

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        from calm_ray.cluster.over_chunks import sum_over_chunks

        record: Entry = {}
        stages = dict(zip(self.reads, inputs, strict=True))
        languages, beta = self.settings.languages, self.settings.train.beta
        experts = experts_of(stages[self.audit.name], self.settings)
        for scores, reference in self.scored:
            counter = ScoreCounter(stages[scores.name], languages, scores.candidates.score)
            optimum = OptimumCounter(counter, stages[reference.name], experts, beta)
            counts = sum_over_chunks(optimum.count, chunk_names(optimum.reference))
            if report := score_report(counts):
                record[scores.part] = {**report, **distance_report(counts)}
        output.finish(record)

    def gamma(self, run: RunDirectory, number: int) -> Floats:
        """Returns gamma [L, L] of a round whose optimum is known."""
        return experts_of(run.stage(number, self.audit.name), self.settings).gamma

    def summary(self, record: Entry) -> Entry:
        return {OPTIMAL: record} if record else {}


def find_optimum(evaluation: Sequence[Step]) -> Optimum | None:
    """Returns the evaluation's `Optimum` step, or None."""
    return next((step for step in evaluation if isinstance(step, Optimum)), None)


def optimum_steps(settings: RunSettings, dco: Dco) -> tuple[Step, ...]:
    """Returns the steps that score candidates under the reference and audit the target, then `Optimum`.

    Covers held-out questions only if they are scored in all languages of the run, which sampled candidates never are.
    """
    training = ReferenceScores(settings)
    scored: list[tuple[ScoringStep, ReferenceScores]] = [(Scores(settings), training)]
    if not settings.samples_candidates and set(settings.languages) <= set(settings.evaluation_languages):
        scored.append((MostLikelyAnswers(settings), ReferenceOnHeldOut(settings)))
    audit = AuditTarget(settings, training, dco)
    return *(reference for _, reference in scored), audit, Optimum(settings, audit, tuple(scored))


@dataclass(frozen=True)
class OptimumCounter:
    """Counts the optimal policy's metrics under a reference, and a policy's distance from it. Picklable.

    Both use summed log-probabilities: the optimal policy is known only up to a constant per question, which other
    conventions would scale differently for each candidate.
    """

    policy: ScoreCounter
    reference: Stage
    """Scores of the same candidates under the reference."""
    experts: Experts
    beta: float

    def count(self, chunk: str) -> Counter[str]:
        by_sum = replace(self.policy, convention="sum")
        scored = read_scored(self.reference, chunk, self.policy.languages, self.experts.columns)
        reference, policy = scores_of(scored), by_sum.read(self.policy.scored, chunk)
        # A prompt that crashes every engine may have been dropped between the two.
        reference, policy = reference.only(set(policy.questions)), policy.only(set(reference.questions))
        optimal = replace(reference, logps=self.experts.optimal(reference, scored))
        counts = count_scores(optimal)
        counts.update(count_distance(policy, optimal, self.beta))
        return counts
