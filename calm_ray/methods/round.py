"""What a step sees of a round, and what `calm-ray show` sees of a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from calm_ray.core.rows import Question, rows_of
from calm_ray.core.settings import RunSettings
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Graph
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines.pool import EnginePool

Asks = Literal["base", "start", "trained"]
"""The policy that answers: the untrained model, the one the round starts from, or the one the round trains."""


@dataclass(frozen=True)
class Round:
    """Round `number`. Round 0 only evaluates the starting policy."""

    number: int
    settings: RunSettings
    run: RunDirectory
    graph: Graph
    """The steps of a round."""
    model: RunModel
    engines: EnginePool
    start: Policy
    policy: Policy | None = None
    """The policy trained in this round; None until training has finished."""

    def stage(self, name: str) -> Stage:
        """The folder of that name in this round."""
        return self.run.stage(self.number, name)

    @property
    def reference(self) -> Policy:
        """The reference policy (`train.reference`)."""
        return Policy() if self.settings.train.reference == "base" else self.start

    def answering(self, asks: Asks) -> Policy:
        if asks == "trained":
            assert self.policy is not None
            return self.policy
        return Policy() if asks == "base" else self.start


@dataclass(frozen=True)
class QuestionView:
    """One question in one round of a run, for `calm-ray show`."""

    run: RunDirectory
    number: int
    """Number of the round."""
    languages: Sequence[str]
    chunk: str
    """The chunk that holds the question in all languages."""
    questions: list[Question]
    """The question in each language."""

    def rows(self, name: str, chunk: str | None = None) -> list[Any]:
        """The question's rows in one folder of the round; `chunk` defaults to the question's chunk."""
        stage = self.run.stage(self.number, name)
        question_id = self.questions[0]["question_id"]
        return [row for row in rows_of(stage.read_chunk(chunk or self.chunk)) if row["question_id"] == question_id]

    def rows_in(self, name: str, language: str) -> list[Any]:
        """Like `rows`, for a folder with one chunk per language, as engines write it."""
        return self.rows(name, f"{self.chunk}-{language}")
