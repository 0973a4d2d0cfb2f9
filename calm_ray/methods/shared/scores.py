"""Log-probabilities that a policy assigns to candidates, for evaluation and DCO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, ClassVar, Literal

from calm_ray.core.console import console
from calm_ray.core.rows import Scored
from calm_ray.core.sections import Candidates
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import EngineStep, Entry
from calm_ray.methods.round import Asks, QuestionView, Round
from calm_ray.methods.work import CHOICE_TOKENS, Sizes, Work
from calm_ray.run.directory import RunDirectory
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines.requests import Score

Part = Literal["training", "held_out"]
"""Which questions to score: those to align on, or those held out."""


class ScoringStep(EngineStep):
    """Scores the candidates of questions and reports on them."""

    settings: RunSettings
    part: ClassVar[Part] = "training"

    @property
    def candidates(self) -> Candidates:
        assert self.settings.candidates is not None
        return self.settings.candidates

    @property
    def reads(self) -> tuple[str, ...]:
        if self.part == "held_out":
            return ("held_out",)
        return ("candidates",) if self.settings.samples_candidates else ("questions",)

    @property
    def first_round(self) -> int:
        return int(self.part == "training" and self.settings.samples_candidates)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.engine_keys, *(f"candidates.{name}" for name in ("form", "score", "chat")))

    @property
    def languages(self) -> list[str]:
        return self.settings.evaluation_languages if self.part == "held_out" else self.settings.languages

    def request(self, round_number: int) -> Score:
        from calm_ray.engines.requests import Score
        from calm_ray.methods.candidates import candidate_form

        form = candidate_form(self.candidates, self.settings.world.seed)
        return Score(form, with_prompt=self.candidates.score == "mean_full")

    def report(self, output: Stage, questions: Stage) -> Entry:
        from calm_ray.cluster.over_chunks import sum_over_chunks
        from calm_ray.evaluation.from_scores import ScoreCounter
        from calm_ray.evaluation.score_report import score_report
        from calm_ray.evaluation.scores import chunk_names

        counter = ScoreCounter(output, self.languages, self.candidates.score)
        return {"report": score_report(sum_over_chunks(counter.count, chunk_names(output)))}

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        rows = sizes.questions * sizes.languages
        if self.part == "held_out":
            rows = sizes.held_out * sizes.evaluation_languages
        return Work(rows=rows, unit="questions", read=rows * scoring_tokens(self.candidates, sizes))


@dataclass(frozen=True)
class Scores(ScoringStep):
    """The new policy's scores on the training questions, which the next round can reuse."""

    settings: RunSettings

    name = "score"

    @property
    def asks(self) -> Asks:
        return "trained"

    def summary(self, record: Entry) -> Entry:
        return {"training": record["report"]}

    def show(self, view: QuestionView) -> None:
        """Prints each candidate's log-probability (nats) and normalized probability, the most likely in bold."""
        from rich.markup import escape
        from rich.table import Table

        if not view.run.stage(view.number, self.name).is_finished:
            console.print(f"round {view.number} has not been scored yet")
            return
        table = Table(title=f"candidates, policy of round {view.number}", title_justify="left")
        for name in ("language", "candidate", "log p", "normalized"):
            table.add_column(name)
        for language in view.languages:
            rows: list[Scored] = view.rows_in(self.name, language)
            for row in rows:
                top = max(row["logps"])
                total = sum(exp(logp - top) for logp in row["logps"])
                for choice, logp in zip(row["choices"], row["logps"], strict=True):
                    cells = [language, choice.replace("\n", " / "), f"{logp:.2f}", f"{exp(logp - top) / total:.0%}"]
                    table.add_row(*(escape(cell) for cell in cells), style="bold" if logp == top else "")
        console.print(table)


@dataclass(frozen=True)
class ReferenceScores(ScoringStep):
    """The reference policy's scores, reused from an earlier round if the candidates are the same."""

    settings: RunSettings

    name = "reference_score"
    made_by: ClassVar[str] = Scores.name
    """The step that scores the same questions with a round's own policy."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*super().keys, "train.reference")

    @property
    def asks(self) -> Asks:
        return "base" if self.settings.train.reference == "base" else "start"

    def output(self, round: Round) -> Stage:
        return self.found(round.run, round.number, round.reference.name)

    def found(self, run: RunDirectory, number: int, reference: str) -> Stage:
        """The stage that holds, or will hold, the scores of the policy `reference`."""
        if not self.settings.samples_candidates:
            for earlier in range(max(1, number)):
                for name in (self.made_by, self.name):
                    stage = run.stage(earlier, name)
                    if stage.is_finished and stage.record["policy"] == reference:
                        return stage
        return run.stage(number, self.name)

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """Free if reused from an earlier round; candidates drawn from samples are new in every round."""
        return super().work(sizes, before) if self.settings.samples_candidates else Work()


def scoring_tokens(candidates: Candidates, sizes: Sizes) -> int:
    """Tokens prefilled to score a question's candidates: letters take one request, others one per candidate."""
    if candidates.form == "letters":
        return sizes.prompt
    return candidate_count(candidates, sizes) * (sizes.prompt + candidate_tokens(candidates, sizes))


def candidate_count(candidates: Candidates, sizes: Sizes) -> int:
    """The most candidates that a question has."""
    return candidates.max_candidates if candidates.form == "samples" else sizes.choices


def candidate_tokens(candidates: Candidates, sizes: Sizes) -> int:
    """Tokens per candidate."""
    return {"letters": 1, "samples": sizes.reply}.get(candidates.form, CHOICE_TOKENS)
