"""A unit of work for an engine: one language of one chunk of questions, under one policy."""

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
    """Questions, or the candidate sets built from them."""
    output: Stage
    chunk: str
    language: str
    policy: Policy = field(default_factory=Policy)
    """The policy the engine must serve. A restarted engine loads it first."""
    without: frozenset[str] = frozenset()
    """Questions to skip because they crash every engine."""
    only: tuple[str, ...] | None = None
    """Makes this a trial: serve just these questions and write nothing."""
    ticket: int = 0
    """Unique id of this dispatch."""

    @property
    def name(self) -> str:
        return f"{self.chunk}-{self.language}"

    def read(self) -> list[Any]:
        """Returns the rows to serve, in the order of the chunk."""
        wanted = None if self.only is None else set(self.only)
        return [
            row
            for row in self._rows()
            if row["question_id"] not in self.without and (wanted is None or row["question_id"] in wanted)
        ]

    def skipped(self) -> list[Any]:
        """Returns the rows of questions that crash every engine."""
        return [row for row in self._rows() if row["question_id"] in self.without] if self.without else []

    def write(self, served: Served[Any]) -> Counts:
        """Writes the rows, unless they are there already or this is a trial; returns their counts."""
        # An engine that was presumed dead while unreachable may still deliver its rows later.
        if self.only is None and not self.output.has(self.name):
            self.output.write(self.name, table(served.kind, served.rows), counts=served.counts)
        return {"rows": len(served.rows), **served.counts}

    def _rows(self) -> list[Any]:
        return [row for row in rows_of(self.questions.read_chunk(self.chunk)) if row["language"] == self.language]
