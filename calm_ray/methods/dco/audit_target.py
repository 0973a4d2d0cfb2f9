"""AUDIT: says what the target is worth before anything is trained on it, and chooses what is `auto`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calm_ray.core.errors import InputError
from calm_ray.core.settings import RunSettings
from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.scores import Scores, Tables, chunk_names, read_scored, scores_of
from calm_ray.methods.base import Entry, Step
from calm_ray.methods.dco.calibration import COLUMNS, Means, calibrated, candidate_sums, mean_recurrence, means_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.gamma import Floats, gammas
from calm_ray.methods.dco.settings import Dco
from calm_ray.methods.round import Round
from calm_ray.methods.shared.audit import (
    CALIBRATED,
    PRODUCT,
    RAW,
    TARGET,
    VOTE,
    WITHOUT,
    Worth,
    audit_report,
    count_answers,
    count_sources,
    print_audit,
    product,
    vote,
    worth_of,
)
from calm_ray.methods.shared.scores import ReferenceScores
from calm_ray.run.stage import Stage

MEANS = "means.json"
LEAST_RECURRENCE = 2.0
"""Questions per candidate, in the mean, below which calibration would remove what there is to learn."""
POOLS = {VOTE: vote, PRODUCT: product}
KEYS = (
    "candidates.calibrate", "dco.gamma", "dco.anchor", "dco.weights", "dco.languages", "dco.target", "train.beta",
)  # fmt: skip
"""What the optimal policy depends on, besides the reference."""


@dataclass(frozen=True)
class AuditTarget(Step):
    """Reports on the target; its record holds gamma and, with `candidates.calibrate`, the candidates' means."""

    settings: RunSettings
    scores: ReferenceScores
    dco: Dco

    name = "audit"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.scores.name,)

    @property
    def first_round(self) -> int:
        return self.scores.first_round

    @property
    def keys(self) -> tuple[str, ...]:
        return (*KEYS, "train.reference")

    def make(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> None:
        from calm_ray.cluster.over_chunks import sum_over_chunks

        settings, (scored,) = self.settings, inputs
        languages, chunks = settings.languages, chunk_names(scored)
        counter = SourceCounter(scored, languages)
        means = None
        if not settings.samples_candidates:
            means = self._means(sum_over_chunks(counter.count_candidates, chunks))
        report = audit_report(sum_over_chunks(SourceCounter(scored, languages, means).count, chunks))
        target: Worth | None = None
        kind = CALIBRATED if calibrates(settings) else RAW
        agreement = {code: report[kind][code]["agreement"] for code in languages} if report else None
        gamma = gammas(self.dco, languages, settings.train.beta, agreement)
        if report:
            if self.dco.languages == "joint" or len(languages) == 2:  # else every pair of languages has its own target
                own_means = means if calibrates(settings) else None
                experts = Experts(gamma, settings.train.beta, own_means, self.dco.target, settings.seed)
                target = worth_of(sum_over_chunks(TargetCounter(counter, experts).count, chunks), TARGET)
            if round.number:
                print_audit(report, target, languages, advice)
        files = []
        if calibrates(settings):
            output.storage.write_json(MEANS, means or {})
            files = [MEANS]
        record = {"report": report, TARGET: target, "agreement": agreement, "gamma": gamma.tolist()}
        output.finish({**record, "fits": self.dco.target}, files)

    def _means(self, sums: Counter[str]) -> Means | None:
        """Raises InputError if the run calibrates candidates that hardly recur."""
        recurrence = mean_recurrence(sums)
        if recurrence >= LEAST_RECURRENCE:
            return means_of(sums)
        if calibrates(self.settings) and sums:
            raise InputError(
                f"candidates.calibrate: a candidate stands in {recurrence:.1f} questions of its subject in the mean, "
                f"but calibration needs {LEAST_RECURRENCE:.0f} or more; set it to false"
            )
        return None

    def summary(self, record: Entry) -> Entry:
        return {"audit": record} if record["report"] else {}


def experts_of(audit: Stage, settings: RunSettings) -> Experts:
    """Returns the experts that a finished audit chose."""
    means = audit.storage.read_json(MEANS) if calibrates(settings) else None
    record = audit.record
    return Experts(np.array(record["gamma"]), settings.train.beta, means, record["fits"], settings.seed)


def calibrates(settings: RunSettings) -> bool:
    return settings.candidates is not None and settings.candidates.calibrate


@dataclass(frozen=True)
class SourceCounter:
    """Counts the sources of a chunk, raw and, with `means`, calibrated. Picklable."""

    scored: Stage
    languages: list[str]
    means: Means | None = None

    def read(self, chunk: str) -> tuple[Scores, Tables]:
        scored = read_scored(self.scored, chunk, self.languages, COLUMNS)
        return scores_of(scored), scored

    def count_candidates(self, chunk: str) -> Counter[str]:
        return candidate_sums(self.read(chunk)[1])

    def count(self, chunk: str) -> Counter[str]:
        scores, scored = self.read(chunk)
        counts = _count(scores, RAW)
        if self.means is not None:
            # Neither + nor |, which drop what was counted zero times.
            counts = Counter({**counts, **_count(calibrated(scores, scored, self.means), CALIBRATED)})
        return counts


@dataclass(frozen=True)
class TargetCounter:
    """Counts the targets of a chunk. Picklable."""

    counter: SourceCounter
    experts: Experts

    def count(self, chunk: str) -> Counter[str]:
        scores, scored = self.counter.read(chunk)
        return count_target(scores, self.experts.optimal(scores, scored))


def _count(scores: Scores, kind: str) -> Counter[str]:
    return count_sources(probabilities(scores.logps), scores.right, scores.languages, kind, POOLS)


def count_target(scores: Scores, optimal: Floats) -> Counter[str]:
    """Counts a chunk's targets, the optimal policy's log-probabilities [L, Q, K], for `worth_of`: those of all
    languages, each beside the reference's answers in all languages."""
    counts: Counter[str] = Counter()
    for fitted in probabilities(optimal):
        counts.update(count_answers(TARGET, fitted, probabilities(scores.logps), scores.right))
    return counts


def advice(kind: str, name: str) -> str:
    """What to set so that the target becomes this source."""
    calibrate = "candidates.calibrate=true" if kind == CALIBRATED else "candidates.calibrate=false"
    pool, without, left_out = name.partition(WITHOUT)
    if pool not in POOLS:
        return f"Consider {calibrate} with 'dco.anchor={{language: {name}, strength: 10}}', or dco.weights=auto"
    weights = "dco.weights=equal" + (f" and leaving {left_out} out of languages" if without else "")
    return f"Consider {calibrate} with {weights}"
