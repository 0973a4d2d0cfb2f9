"""How likely a policy finds the candidates of questions: for evaluation, and for what DCO makes of it."""

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
"""Which questions: those to align on, or those held out."""


class ScoringStep(EngineStep):
    """Scores of the candidates of some questions, and their report."""

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
        return ("candidates",) if self.settings.draws_candidates else ("questions",)

    @property
    def first_round(self) -> int:
        return int(self.part == "training" and self.settings.draws_candidates)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.keys_of_engines, *(f"candidates.{name}" for name in ("form", "score", "chat")))

    @property
    def languages(self) -> list[str]:
        return self.settings.asked_languages if self.part == "held_out" else self.settings.languages

    def request(self, round_number: int) -> Score:
        from calm_ray.engines.requests import Score
        from calm_ray.methods.candidates import candidate_form

        form = candidate_form(self.candidates, self.settings.world.seed)
        return Score(form, with_prompt=self.candidates.score == "mean_full")

    def report(self, output: Stage, questions: Stage) -> Entry:
        from calm_ray.cluster.over_chunks import count_over
        from calm_ray.evaluation.from_scores import ScoreCounter
        from calm_ray.evaluation.score_report import score_report
        from calm_ray.evaluation.scores import chunks_of

        counter = ScoreCounter(output, self.languages, self.candidates.score)
        return {"report": score_report(count_over(counter.count, chunks_of(output)))}

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        rows = sizes.questions * sizes.languages
        if self.part == "held_out":
            rows = sizes.held_out * sizes.evaluation_languages
        return Work(rows=rows, unit="questions", read=rows * read_to_score(self.candidates, sizes))


@dataclass(frozen=True)
class Scores(ScoringStep):
    """The new policy's scores of the questions trained on: the next round may start from them."""

    settings: RunSettings

    name = "score"

    @property
    def asks(self) -> Asks:
        return "trained"

    def summary(self, record: Entry) -> Entry:
        return {"training": record["report"]}

    def show(self, view: QuestionView) -> None:
        """How likely the round's policy finds each candidate, in nats, and its share; the likeliest is bold."""
        from rich.markup import escape
        from rich.table import Table

        if not view.run.stage(view.number, self.name).is_finished:
            console.print(f"round {view.number} has not been scored yet")
            return
        table = Table(title=f"candidates, policy of round {view.number}", title_justify="left")
        for name in ("language", "candidate", "log p", "share"):
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
    """The reference's scores: those that an earlier round has of it already, where the candidates are the same."""

    settings: RunSettings

    name = "reference_score"
    made_by: ClassVar[str] = Scores.name
    """The step by which a policy's own round scores the same questions."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*super().keys, "train.reference")

    @property
    def asks(self) -> Asks:
        return "base" if self.settings.train.reference == "base" else "start"

    def output(self, round: Round) -> Stage:
        return self.found(round.run, round.number, round.reference.name)

    def found(self, run: RunDirectory, number: int, reference: str) -> Stage:
        """Where the scores of the policy of that name are, or will be."""
        if not self.settings.draws_candidates:
            for earlier in range(max(1, number)):
                for name in (self.made_by, self.name):
                    stage = run.stage(earlier, name)
                    if stage.is_finished and stage.record["policy"] == reference:
                        return stage
        return run.stage(number, self.name)

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """Scores that an earlier round made cost nothing; candidates from samples are new in every round."""
        return super().work(sizes, before) if self.settings.draws_candidates else Work()


def read_to_score(candidates: Candidates, sizes: Sizes) -> int:
    """Tokens read to score a question's candidates: letters in one request, others in one for each."""
    if candidates.form == "letters":
        return sizes.prompt
    count = candidates.most if candidates.form == "samples" else sizes.choices
    return count * (sizes.prompt + side_of(candidates, sizes))


def side_of(candidates: Candidates, sizes: Sizes) -> int:
    """Tokens of a candidate."""
    return {"letters": 1, "samples": sizes.reply}.get(candidates.form, CHOICE_TOKENS)
