"""One round of a run, as its steps see it, and one question of it, as a person does."""

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
"""Which policy answers a step: the model before any training, the one the round starts from, or the one it made."""


@dataclass(frozen=True)
class Round:
    """Round `number`, from the policy it starts from; round 0 has no training, and only evaluates."""

    number: int
    settings: RunSettings
    run: RunDirectory
    graph: Graph
    """The steps of a round."""
    model: RunModel
    engines: EnginePool
    start: Policy
    policy: Policy | None = None
    """What the round made; None before its training is finished."""

    def stage(self, name: str) -> Stage:
        """The round's own folder of that name."""
        return self.run.stage(self.number, name)

    @property
    def reference(self) -> Policy:
        """What margins are measured against (`train.reference`)."""
        return Policy() if self.settings.train.reference == "base" else self.start

    def answering(self, asks: Asks) -> Policy:
        """The policy that answers a step."""
        if asks == "trained":
            assert self.policy is not None
            return self.policy
        return Policy() if asks == "base" else self.start


@dataclass(frozen=True)
class QuestionView:
    """One question in one round of a run, for `calm-ray show`."""

    run: RunDirectory
    number: int
    """Of the round."""
    languages: Sequence[str]
    chunk: str
    """Holds the question, in all its languages."""
    questions: list[Question]
    """The question in each language."""

    def rows(self, name: str, chunk: str | None = None) -> list[Any]:
        """The question's rows in one folder of the round, by default in its own chunk."""
        stage = self.run.stage(self.number, name)
        question_id = self.questions[0]["question_id"]
        return [row for row in rows_of(stage.read_chunk(chunk or self.chunk)) if row["question_id"] == question_id]

    def rows_in(self, name: str, language: str) -> list[Any]:
        """The same of a folder that engines fill, a chunk for each language."""
        return self.rows(name, f"{self.chunk}-{language}")
