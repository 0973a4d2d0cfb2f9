"""Which trees a step takes, which worker computes them, and in how many forward passes.

A step takes `batch_pairs` trees across all workers. The number of workers and the size of a forward pass affect only
where a tree is computed, never which trees a step takes or how they are weighted.
"""

from __future__ import annotations

from collections.abc import Sequence

from calm_ray.core.seeds import derive_seed, rng_of
from calm_ray.packing.batch import split_into_packs


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Order of `count` examples in an epoch, the same on every worker."""
    return rng_of(seed, "epoch", epoch).sample(range(count), count)


def assign(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Balances items over workers by tokens: largest first, each to the least loaded worker."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        worker = min(range(workers), key=lambda w: (load[w], w))
        shares[worker].append(item)
        load[worker] += sizes[item]
    return shares


def worker_packs(sizes: Sequence[int], worker: int, workers: int, limit: int) -> list[list[int]]:
    """One worker's packs in a step; the same number for every worker.

    Sharded workers must make the same number of forward passes. For an empty pack, compute anything and weight it 0.
    """
    plans = [split_into_packs(share, sizes, limit) for share in assign(sizes, workers)]
    most = max(len(plan) for plan in plans)
    return plans[worker] + [[]] * (most - len(plans[worker]))


def is_validation(question_id: str, fraction: float, seed: int) -> bool:
    """Whether a question is held out for validation, in all languages at once so that none leaks into training."""
    return derive_seed(seed, "validation", question_id) / 2**31 < fraction
