"""Ray Data over a run's chunks. Each task handles one chunk, so nothing is shuffled and no task holds more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from calm_ray.cluster.resources import DATA_CPUS

Count = Callable[[str], Counter[str]]
"""Takes a chunk's name and returns its counts."""


def over_chunks(task: Count, chunks: Sequence[str]) -> Iterator[Counter[str]]:
    """Runs the task on every chunk; yields each chunk's counts as it finishes."""

    def in_task(row: dict[str, Any]) -> dict[str, Any]:
        return {"counts": json.dumps(task(str(row["chunk"])))}

    if chunks:
        dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        for row in dataset.map(in_task, num_cpus=DATA_CPUS).iter_rows():
            yield Counter(json.loads(row["counts"]))


def sum_over_chunks(count: Count, chunks: Sequence[str]) -> Counter[str]:
    """Sums the counts of all chunks."""
    total: Counter[str] = Counter()
    for counts in over_chunks(count, chunks):
        total.update(counts)
    return total
