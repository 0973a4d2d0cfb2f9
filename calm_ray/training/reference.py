"""The reference's log-probabilities of the pairs: computed once in a round, and read where training goes on.

    margins/*.parquet   parts of them, written as they are computed and deleted when all are there
    margins.parquet     all of them

A part names its pairs, so it does not matter how many workers made it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from calm_ray.core.rows import Margin, rows_of, table
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage
from calm_ray.training.batches import Example, Key

MARGINS = "margins"
"""The chunk of the stage that holds them, and the folder of its parts."""
PART_PAIRS = 1024
"""Pairs of each worker in a part: what is computed again where a worker is lost."""

Portion = Sequence[Example]


def margins_once(
    stage: Stage,
    reference: Policy,
    examples: Sequence[Example],
    compute: Callable[[Sequence[Portion]], Iterable[list[Margin]]],
) -> dict[Key, Margin]:
    """The margins of all examples, known to every worker: read from the stage, or computed and written there.

    `compute` gives each worker's share of the margins of one portion after the other. They are kept as they come: an
    attempt with any number of workers computes what the one before it did not.
    """
    is_first = dist.get_rank() == 0
    found = [_kept(stage, reference) if is_first else {}]
    dist.broadcast_object_list(found)
    (known,) = found
    missing = [example for example in examples if example.key not in known]
    size = PART_PAIRS * dist.get_world_size()
    portions = [missing[first : first + size] for first in range(0, len(missing), size)]
    for number, own in enumerate(compute(portions) if portions else [], start=1):
        shares: list[list[Margin]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, own)
        rows = [row for share in shares for row in share]
        known |= _by_key(rows)
        if is_first and number < len(portions):
            stage.storage.write_table(f"{MARGINS}/{uuid.uuid4().hex}.parquet", table(Margin, rows))
    margins = {example.key: known[example.key] for example in examples}
    if is_first:
        if portions:
            stage.write(MARGINS, table(Margin, list(margins.values())))
        stage.storage.delete(MARGINS)
    return margins


def margins_of(examples: Sequence[Example], logps: Tensor, reference: Policy) -> list[Margin]:
    """The rows of a batch, whose log-probabilities [2 B] are those of chosen and rejected in turn."""
    sums = logps.tolist()
    return [
        Margin(
            question_id=example.question_id,
            language=example.language,
            pair=example.pair,
            reference=reference.name,
            ref_chosen_logps=sums[2 * i],
            ref_rejected_logps=sums[2 * i + 1],
        )
        for i, example in enumerate(examples)
    ]


def _kept(stage: Stage, reference: Policy) -> dict[Key, Margin]:
    """The margins of this reference that the stage has; without those in files that are not as they were written."""
    tables = []
    if MARGINS in stage.chunks() and f"{MARGINS}.parquet" not in stage.flawed():
        tables.append(stage.read_chunk(MARGINS))
    for name in stage.storage.files(MARGINS):
        try:
            tables.append(stage.storage.read_table(f"{MARGINS}/{name}"))
        except (OSError, ValueError):  # torn
            continue
    return _by_key([row for one in tables for row in rows_of(one) if row["reference"] == reference.name])


def _by_key(rows: Sequence[Margin]) -> dict[Key, Margin]:
    return {(row["question_id"], row["language"], row["pair"]): row for row in rows}
