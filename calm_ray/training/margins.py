"""The reference's log-probabilities of the pairs: computed once in a round, and read where training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from calm_ray.policies import Policy
from calm_ray.rows import Margin, rows_of, table
from calm_ray.stage import Stage
from calm_ray.training.batches import Example

MARGINS = "margins"
"""The chunk of the stage that holds them."""


def margins_once(
    stage: Stage, reference: Policy, examples: Sequence[Example], compute: Callable[[], list[Margin]]
) -> list[Margin]:
    """The margins of all examples, known to every worker: read from the stage, or computed and written there.

    `compute` gives each worker's share of them.
    """
    is_first = dist.get_rank() == 0
    found = [_kept(stage, reference, examples) if is_first else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    parts: list[list[Margin]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, compute())
    rows = [row for part in parts for row in part]
    if is_first:
        stage.write(MARGINS, table(Margin, rows))
    return rows


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


def _kept(stage: Stage, reference: Policy, examples: Sequence[Example]) -> list[Margin] | None:
    """The stage's margins; None unless they are whole, of this reference, and there is one for every example."""
    if MARGINS not in stage.chunks() or f"{MARGINS}.parquet" in stage.flawed():
        return None
    rows: list[Margin] = rows_of(stage.read_chunk(MARGINS))
    known = {(row["question_id"], row["language"], row["pair"]) for row in rows if row["reference"] == reference.name}
    return rows if known >= {example.key for example in examples} else None
