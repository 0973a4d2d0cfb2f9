"""The figures of scored candidates of a run, counted chunk by chunk, and which answers changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from calm_ray.evaluation.score_report import count_scores
from calm_ray.evaluation.scores import Scores, columns_for, read_scored, scores_of
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class ScoreCounter:
    """Counts what a policy's scores say. Picklable: each chunk is a task's."""

    scored: Stage
    languages: list[str]
    convention: str

    def count(self, chunk: str) -> Counter[str]:
        return count_scores(self.read(self.scored, chunk))

    def read(self, stage: Stage, chunk: str) -> Scores:
        return scores_of(read_scored(stage, chunk, self.languages, columns_for(self.convention)), self.convention)


def likeliest_answers(stage: Stage, convention: str) -> dict[tuple[str, str], str | None]:
    """(language, question_id) -> the candidate that the stage's policy finds likeliest, by its index."""
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
