"""Ray Data over a run's chunks: one task takes one chunk, so nothing is shuffled and no task sees more than a chunk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from calm_ray.cluster.resources import DATA_CPUS

Count = Callable[[str], Counter[str]]
"""Takes a chunk's name; returns what is counted in it."""


def over_chunks(task: Count, chunks: Sequence[str]) -> Iterator[Counter[str]]:
    """The task's counts of each chunk, as they are finished."""

    def in_task(row: dict[str, Any]) -> dict[str, Any]:
        return {"counts": json.dumps(task(str(row["chunk"])))}

    if chunks:
        dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        for row in dataset.map(in_task, num_cpus=DATA_CPUS).iter_rows():
            yield Counter(json.loads(row["counts"]))


def count_over(count: Count, chunks: Sequence[str]) -> Counter[str]:
    """The sum of what is counted in each chunk."""
    total: Counter[str] = Counter()
    for counts in over_chunks(count, chunks):
        total.update(counts)
    return total
