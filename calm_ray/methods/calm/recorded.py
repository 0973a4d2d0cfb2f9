"""Completions that lie on disk, in chunks that hold some questions whole, in all their languages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from calm_ray.core.rows import Question, rows_of
from calm_ray.prompts.questions import question_text
from calm_ray.run.stage import Stage

ASKED = pa.schema(
    [
        ("question_id", pa.string()),
        ("language", pa.string()),
        ("prompt", pa.string()),  # the question with its options, as the model was asked
        ("choices", pa.list_(pa.string())),
        ("gold", pa.string()),
    ]
)
COMPLETIONS = pa.schema(
    [("question_id", pa.string()), ("language", pa.string()), ("sample", pa.int64()), ("text", pa.string())]
)


@dataclass(frozen=True)
class Recorded:
    """Some questions in all their languages, and the completions to them."""

    asked: pa.Table
    """`ASKED`, one row for each question and language."""
    completions: pa.Table
    """`COMPLETIONS`, the samples of one question in one language in their order."""


@dataclass(frozen=True)
class RecordedChunks:
    """Chunks of completions in two stages. Picklable: tasks read them."""

    asked: Stage
    """A file for each chunk: `ASKED`, or a run's questions."""
    completions: Stage
    """For each chunk a file of its own name, or one for each language, as `00000-en`."""
    chunks: dict[str, list[str]]
    """The names of each chunk's files of completions."""

    def read(self, chunk: str) -> Recorded:
        asked = self.asked.read_chunk(chunk)
        if "prompt" not in asked.column_names:
            asked = asked_of(rows_of(asked))
        names = COMPLETIONS.names
        parts = [self.completions.read_chunk(name, names) for name in self.chunks[chunk]]
        return Recorded(asked, pa.concat_tables(parts))


def asked_of(questions: Sequence[Question]) -> pa.Table:
    """Questions as `ASKED`."""
    return pa.Table.from_pylist([{**row, "prompt": question_text(row)} for row in questions], ASKED)
