"""`bad_prompts.parquet`: the prompts of a run that end every engine they are given to. They are asked no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calm_ray.rows import BadPrompt, rows_of, table
from calm_ray.sampling.dispatch import Blamed
from calm_ray.stage import Stage
from calm_ray.storage import Storage

FILE = "bad_prompts.parquet"


@dataclass(frozen=True)
class BadPrompts:
    storage: Storage
    """The run's."""

    def known(self, questions: Stage) -> set[tuple[str, str]]:
        """(question, language) of the bad prompts among these questions."""
        asked = self._name(questions)
        return {(row["question_id"], row["language"]) for row in self._rows() if row["questions"] == asked}

    def add(self, questions: Stage, output: Stage, found: Sequence[Blamed]) -> None:
        """Lists more of them, found while `output` was made."""
        if not found:
            return
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
        self.storage.write_table(FILE, table(BadPrompt, [*self._rows(), *rows]))

    def _rows(self) -> list[BadPrompt]:
        return rows_of(self.storage.read_table(FILE)) if self.storage.exists(FILE) else []

    def _name(self, stage: Stage) -> str:
        """A stage's folder within the run."""
        return stage.storage.uri().removeprefix(self.storage.uri()).lstrip("/")
