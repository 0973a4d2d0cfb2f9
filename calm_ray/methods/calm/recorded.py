"""Completions on disk, in chunks; a chunk holds all languages of its questions."""

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
        ("prompt", pa.string()),  # question and options, as shown to the model
        ("choices", pa.list_(pa.string())),
        ("gold", pa.string()),
    ]
)
COMPLETIONS = pa.schema(
    [("question_id", pa.string()), ("language", pa.string()), ("sample", pa.int64()), ("text", pa.string())]
)


@dataclass(frozen=True)
class Recorded:
    """Questions in all their languages, and their completions."""

    asked: pa.Table
    """`ASKED`, one row per question and language."""
    completions: pa.Table
    """`COMPLETIONS`, with the samples of each question and language in order."""


@dataclass(frozen=True)
class RecordedChunks:
    """Chunks of questions and completions, in two stages. Picklable, since tasks read them."""

    asked: Stage
    """One file per chunk: `ASKED`, or a run's questions."""
    completions: Stage
    """One file per chunk, under the chunk's name, or one per language, such as `00000-en`."""
    chunks: dict[str, list[str]]
    """Chunk -> names of its files in `completions`."""

    def read(self, chunk: str) -> Recorded:
        asked = self.asked.read_chunk(chunk)
        if "prompt" not in asked.column_names:
            asked = asked_of(rows_of(asked))
        names = COMPLETIONS.names
        parts = [self.completions.read_chunk(name, names) for name in self.chunks[chunk]]
        return Recorded(asked, pa.concat_tables(parts))


def asked_of(questions: Sequence[Question]) -> pa.Table:
    """Converts questions to `ASKED`."""
    return pa.Table.from_pylist([{**row, "prompt": question_text(row)} for row in questions], ASKED)
