"""`bad_prompts.parquet`: the prompts of a run that end every engine they are given to. They are asked no more."""

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
    """The run's."""

    def known(self, questions: Stage) -> set[tuple[str, str]]:
        """(question, language) of the bad prompts among these questions."""
        asked = self._name(questions)
        return {(row["question_id"], row["language"]) for row in self._rows() if row["questions"] == asked}

    def noting(self, questions: Stage, output: Stage) -> Callable[[Sequence[Blamed]], None]:
        """What lists the bad prompts that are found while `output` is made, beside those that are known by now."""
        before = self._rows()
        return lambda found: self._write(before, questions, output, found)

    def _write(self, before: list[BadPrompt], questions: Stage, output: Stage, found: Sequence[Blamed]) -> None:
        rows = [
            BadPrompt(
                question_id=one.question_id,
                language=one.language,
                questions=self._name(questions),
                stage=self._name(output),
                chunk=one.chunk,
                error=one.error,
            )
            for one in found
        ]
        self.storage.write_table(FILE, table(BadPrompt, [*before, *rows]))

    def _rows(self) -> list[BadPrompt]:
        if not self.storage.exists(FILE):
            return []
        try:
            return rows_of(self.storage.read_table(FILE))
        except (OSError, pa.ArrowException):
            raise InputError(f"{self.storage.uri(FILE)} is torn; delete it, and its prompts are found again") from None

    def _name(self, stage: Stage) -> str:
        """A stage's folder within the run."""
        return stage.storage.uri().removeprefix(self.storage.uri()).lstrip("/")


@dataclass(frozen=True)
class Blamed:
    """A question, in one language, that ends every engine it is given to."""

    question_id: str
    language: str
    chunk: str
    error: str
    """How the last engine ended."""
