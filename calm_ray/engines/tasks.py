"""What an engine is asked to do: one language of one chunk of questions, under one policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from calm_ray.core.rows import rows_of, table
from calm_ray.engines.requests import Counts, Served
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class ChunkTask:
    """One language of one chunk of questions, and the stage its rows are written into."""

    questions: Stage
    """Questions, or the candidate sets made of them."""
    output: Stage
    chunk: str
    language: str
    policy: Policy = field(default_factory=Policy)
    """The policy the engine must serve. A restarted engine, which has another one, loads it first."""
    without: frozenset[str] = frozenset()
    """Questions that are skipped: they crash every engine."""
    only: tuple[str, ...] | None = None
    """A trial: just these questions, and nothing is written."""

    ticket: int = 0
    """Unique id of this dispatch."""

    @property
    def name(self) -> str:
        return f"{self.chunk}-{self.language}"

    def read(self) -> list[Any]:
        """The rows of the chunk in the task's language that the task is about, in their order."""
        asked = None if self.only is None else set(self.only)
        return [
            row
            for row in self._rows()
            if row["question_id"] not in self.without and (asked is None or row["question_id"] in asked)
        ]

    def skipped(self) -> list[Any]:
        """The rows of questions that crash every engine."""
        return [row for row in self._rows() if row["question_id"] in self.without] if self.without else []

    def write(self, served: Served[Any]) -> Counts:
        """Writes what the task's request made, once, unless it is a trial; returns its counts."""
        # An engine that was taken for dead while out of reach may come with rows of its own later.
        if self.only is None and not self.output.has(self.name):
            self.output.write(self.name, table(served.kind, served.rows), counts=served.counts)
        return {"rows": len(served.rows), **served.counts}

    def _rows(self) -> list[Any]:
        return [row for row in rows_of(self.questions.read_chunk(self.chunk)) if row["language"] == self.language]
