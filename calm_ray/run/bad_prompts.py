"""`bad_prompts.parquet`: prompts that crash every engine. Later stages skip them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from calm_ray.core.errors import InputError
from calm_ray.core.rows import BadPrompt, rows_of, table
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

FILE = "bad_prompts.parquet"


@dataclass(frozen=True)
class BadPrompts:
    storage: Storage
    """Rooted at the run."""

    def known(self, questions: Stage) -> set[tuple[str, str]]:
        """Returns (question_id, language) of the known bad prompts among these questions."""
        name = self._name(questions)
        return {(row["question_id"], row["language"]) for row in self._rows() if row["questions"] == name}

    def noting(self, questions: Stage, output: Stage) -> Callable[[Sequence[FoundBadPrompt]], None]:
        """Returns a callback that saves the bad prompts found while filling `output`, after those already known."""
        before = self._rows()
        return lambda found: self._write(before, questions, output, found)

    def _write(self, before: list[BadPrompt], questions: Stage, output: Stage, found: Sequence[FoundBadPrompt]) -> None:
        rows = [
            BadPrompt(
                question_id=prompt.question_id,
                language=prompt.language,
                questions=self._name(questions),
                stage=self._name(output),
                chunk=prompt.chunk,
                error=prompt.error,
            )
            for prompt in found
        ]
        self.storage.write_table(FILE, table(BadPrompt, [*before, *rows]))

    def _rows(self) -> list[BadPrompt]:
        if not self.storage.exists(FILE):
            return []
        try:
            return rows_of(self.storage.read_table(FILE))
        except (OSError, pa.ArrowException):
            raise InputError(
                f"{self.storage.uri(FILE)} is corrupt; delete it, and the run will find its bad prompts again"
            ) from None

    def _name(self, stage: Stage) -> str:
        """The stage's folder, relative to the run."""
        return stage.storage.uri().removeprefix(self.storage.uri()).lstrip("/")


@dataclass(frozen=True)
class FoundBadPrompt:
    """A question in one language that crashes every engine."""

    question_id: str
    language: str
    chunk: str
    error: str
    """How the last engine crashed."""
