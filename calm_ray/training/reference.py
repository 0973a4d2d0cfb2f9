"""Reference log-probabilities of the trees: computed once per round, reused when training resumes.

    reference/*.parquet   parts, written as they are computed and deleted once all are done
    reference.parquet     all of them

A part names its trees, so the number of workers that wrote it does not matter.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from calm_ray.core.rows import ReferenceLogps, rows_of, table
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage
from calm_ray.training.trees import Key, Tree

REFERENCE = "reference"
"""Chunk of the stage, and the folder for its parts."""
PART_TREES = 1024
"""Trees per worker in a part: at most this many are recomputed when a worker is lost."""

Portion = Sequence[Tree]
Logps = dict[Key, list[float]]
"""Summed log-probabilities of each tree's branches, in nats."""


def reference_once(
    stage: Stage,
    reference: Policy,
    trees: Sequence[Tree],
    compute: Callable[[Sequence[Portion]], Iterable[list[ReferenceLogps]]],
) -> Logps:
    """Log-probabilities of all trees, on every worker: read from the stage, or computed and written to it.

    `compute` yields this worker's share of each portion in turn. Portions are saved as they arrive, so a later attempt,
    with any number of workers, computes only the missing ones. Collective: call on all ranks.
    """
    is_first = dist.get_rank() == 0
    found = [_stored(stage, reference) if is_first else {}]
    dist.broadcast_object_list(found)
    (known,) = found
    missing = [tree for tree in trees if tree.key not in known]
    size = PART_TREES * dist.get_world_size()
    portions = [missing[first : first + size] for first in range(0, len(missing), size)]
    for number, own in enumerate(compute(portions) if portions else [], start=1):
        shares: list[list[ReferenceLogps]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, own)
        rows = [row for share in shares for row in share]
        known |= _by_key(rows)
        if is_first and number < len(portions):
            stage.storage.write_table(f"{REFERENCE}/{uuid.uuid4().hex}.parquet", table(ReferenceLogps, rows))
    logps = {tree.key: known[tree.key] for tree in trees}
    if is_first:
        if portions:
            rows = [_row(tree, logps[tree.key], reference) for tree in trees]
            stage.write(REFERENCE, table(ReferenceLogps, rows))
        stage.storage.delete(REFERENCE)
    return logps


def rows_of_batch(trees: Sequence[Tree], logps: Tensor, reference: Policy) -> list[ReferenceLogps]:
    """One row per tree; `logps` [N] are those of their branches, in tree order."""
    sums = iter(logps.tolist())
    return [_row(tree, [next(sums) for _ in tree.branches], reference) for tree in trees]


def _row(tree: Tree, logps: list[float], reference: Policy) -> ReferenceLogps:
    return ReferenceLogps(
        question_id=tree.question_id, language=tree.language, number=tree.number, reference=reference.name, logps=logps
    )


def _stored(stage: Stage, reference: Policy) -> Logps:
    """What the stage holds for this reference, skipping corrupt files."""
    tables = []
    if REFERENCE in stage.chunks() and f"{REFERENCE}.parquet" not in stage.flawed():
        tables.append(stage.read_chunk(REFERENCE))
    for name in stage.storage.files(REFERENCE):
        try:
            tables.append(stage.storage.read_table(f"{REFERENCE}/{name}"))
        except (OSError, ValueError):  # corrupt
            continue
    return _by_key([row for one in tables for row in rows_of(one) if row["reference"] == reference.name])


def _by_key(rows: Sequence[ReferenceLogps]) -> Logps:
    return {(row["question_id"], row["language"], row["number"]): row["logps"] for row in rows}
