"""From trees to packed batches: which trees a step takes, which worker computes them, and their memory layout.

A step takes `batch_pairs` trees across all workers. The number of workers and the size of a forward pass affect only
where a tree is computed, never which trees a step takes or how they are weighted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calm_ray.core.seeds import derive_seed, rng_of
from calm_ray.training.trees import Branch, Tree

IGNORED = -100
"""Label of unscored positions."""


@dataclass(frozen=True)
class PackedBatch:
    """N branches in tree order, each after its prompt, concatenated into one row of T tokens without padding.

    `labels` are shifted: position t holds the token that position t predicts, or IGNORED.
    """

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T], from 0 in each sequence."""
    labels: Tensor
    """[1, T]"""
    sequence_ids: Tensor
    """[T], the sequence of each token."""
    boundaries: Tensor
    """[N + 1], int32, the start of each sequence, then T."""
    longest: int
    completion_lengths: Tensor
    """[N], float, number of scored tokens."""

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


def pack(trees: Sequence[Tree]) -> PackedBatch:
    """Concatenates the trees' branches, each after its own copy of the prompt."""
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    boundaries = [0]
    lengths: list[int] = []
    for number, (prompt, branch) in enumerate((tree.prompt, branch) for tree in trees for branch in tree.branches):
        sequence = prompt + branch.tokens
        tokens += sequence
        positions += range(len(sequence))
        labels += [IGNORED] * (len(prompt) - 1) + _labels(branch) + [IGNORED]
        owners += [number] * len(sequence)
        boundaries.append(len(tokens))
        lengths.append(branch.scored_tokens)
    return PackedBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor([labels]),
        sequence_ids=torch.tensor(owners),
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        longest=max(end - start for start, end in itertools.pairwise(boundaries)),
        completion_lengths=torch.tensor(lengths, dtype=torch.float32),
    )


def _labels(branch: Branch) -> list[int]:
    """The branch's tokens, IGNORED where unscored."""
    if branch.scored is None:
        return branch.tokens
    return [token if scored else IGNORED for token, scored in zip(branch.tokens, branch.scored, strict=True)]


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


def split_into_packs(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Groups items into packs of at most `limit` tokens; a larger item gets a pack to itself."""
    packs: list[list[int]] = []
    room = 0
    for item in items:
        if not packs or sizes[item] > room:
            packs.append([])
            room = limit
        packs[-1].append(item)
        room -= sizes[item]
    return packs


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
