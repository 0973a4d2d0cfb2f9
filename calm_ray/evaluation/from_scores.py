"""Metrics of a run's scored candidates, counted chunk by chunk, and the answers that changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from calm_ray.evaluation.score_report import count_scores
from calm_ray.evaluation.scores import Scores, columns_of_convention, read_scored, scores_of
from calm_ray.prompts.candidates import label
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class ScoreCounter:
    """Counts a policy's metrics. Picklable: each chunk is counted by a task."""

    scored: Stage
    languages: list[str]
    convention: str

    def count(self, chunk: str) -> Counter[str]:
        return count_scores(self.read(self.scored, chunk))

    def read(self, stage: Stage, chunk: str) -> Scores:
        return scores_of(
            read_scored(stage, chunk, self.languages, columns_of_convention(self.convention)), self.convention
        )


def most_likely_answers(stage: Stage, convention: str) -> dict[tuple[str, str], str | None]:
    """Returns (language, question_id) -> letter of the candidate that the stage's policy finds most likely; after Z its
    number."""
    found: dict[tuple[str, str], str | None] = {}
    for chunk in sorted(stage.chunks()):
        language = chunk.rpartition("-")[2]
        scores = scores_of({language: stage.read_chunk(chunk, columns_of_convention(convention))}, convention)
        found |= {(language, q): label(a) for q, a in zip(scores.questions, scores.answers[0], strict=True)}
    return found


def changed_answers(
    now: Mapping[tuple[str, str], str | None], before: Mapping[tuple[str, str], str | None]
) -> dict[str, float]:
    """Returns, per language, the fraction of questions whose answer changed (DCO, section 6.4)."""
    total: Counter[str] = Counter(language for language, _ in now)
    changed = Counter(key[0] for key, answer in now.items() if answer != before.get(key))
    return {language: changed[language] / count for language, count in total.items()}
