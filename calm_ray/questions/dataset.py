"""Questions as a Ray Dataset: one task per file, so that a large source never passes through the driver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa
import ray.data

from calm_ray.core.errors import BadRow
from calm_ray.core.rows import Question, table
from calm_ray.questions.parallel import refusal
from calm_ray.questions.reader import OnBadRow, read_part
from calm_ray.questions.sources import Part, open_source

BLOCK = 1_000
"""Rows that a task yields at a time; Ray Data merges them into blocks of its preferred size."""


def question_dataset(
    source: str,
    *,
    on_bad_row: OnBadRow = "refuse",
    format: str | None = None,
    language: str | None = None,
    languages: Sequence[str] | None = None,
) -> ray.data.Dataset:
    """Returns the rows of a source that are valid on their own, as `Question` rows.

    See `open_source` for the arguments and what it raises. With `refuse`, the first bad row that a task meets raises
    InputError where the rows are consumed. Checks that need all rows, such as for duplicate ids or mismatched
    languages, are left to `load_questions` and `survey`. Every node must see the files under the same paths.
    """
    parts = open_source(source, format=format, language=language, languages=languages)

    def blocks(batch: pa.Table) -> Iterator[pa.Table]:
        for fields in batch.to_pylist():
            rows = _questions(Part(**fields), on_bad_row, languages)
            while block := list(islice(rows, BLOCK)):
                yield table(Question, block)

    items = [{"name": part.name, "format": part.format, "language": part.language} for part in parts]
    files = ray.data.from_items(items, override_num_blocks=len(items))
    return files.map_batches(blocks, batch_size=1, batch_format="pyarrow")


def _questions(part: Part, on_bad_row: OnBadRow, languages: Sequence[str] | None) -> Iterator[Question]:
    for row in read_part(part):
        if isinstance(row.found, BadRow):
            if on_bad_row == "refuse":
                raise refusal([row.problem(row.found)], 1)
        elif languages is None or row.found["language"] in languages:
            yield row.found
