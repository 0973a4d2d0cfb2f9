"""Ray Data over a run's chunks: one task takes one chunk, so nothing is shuffled and no task sees more than a chunk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from calm_ray.cluster.resources import DATA_CPUS

ChunkJob = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes {"chunk": its name}; returns a flat row."""


def over_chunks(task: ChunkJob, chunks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The task's row for each chunk, as they are finished."""
    if chunks:
        dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        yield from dataset.map(task, num_cpus=DATA_CPUS).iter_rows()


def count_over(count: Callable[[str], Counter[str]], chunks: Sequence[str]) -> Counter[str]:
    """The sum of what is counted in each chunk."""

    def task(row: dict[str, Any]) -> dict[str, Any]:
        return {"counts": json.dumps(count(str(row["chunk"])))}

    total: Counter[str] = Counter()
    for row in over_chunks(task, chunks):
        total.update(json.loads(row["counts"]))
    return total
