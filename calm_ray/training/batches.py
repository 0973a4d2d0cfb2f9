"""From pairs to packed batches: which pairs a step takes, which worker computes them, and how they lie in memory.

A step takes `batch_pairs` pairs over all workers. How many workers there are, and how much fits into one forward pass,
decide only where a pair is computed, never which pairs a step takes or how they are weighed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calm_ray.core.rows import Pair
from calm_ray.core.seeds import derive_seed, rng_of

IGNORED = -100
"""Label of positions that are not scored."""


Key = tuple[str, str, int]
"""Question, language and number of a pair."""


@dataclass(frozen=True)
class Example:
    """A pair as the trainer sees it."""

    question_id: str
    language: str
    pair: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    target: float | None = None
    """What beta times the margin is fitted to (DCO)."""

    @property
    def key(self) -> Key:
        return self.question_id, self.language, self.pair

    def sequences(self, chosen_only: bool) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of each side that is computed."""
        sides = [self.chosen] if chosen_only else [self.chosen, self.rejected]
        return [(self.prompt, side) for side in sides]

    def tokens(self, chosen_only: bool) -> int:
        return sum(len(prompt) + len(side) for prompt, side in self.sequences(chosen_only))

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def example_of(row: Pair) -> Example:
    return Example(
        row["question_id"],
        row["language"],
        row["pair"],
        row["prompt_token_ids"],
        row["chosen_token_ids"],
        row["rejected_token_ids"],
        row.get("target_margin"),
    )


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end without padding, one row. T tokens, N sequences (chosen, rejected, chosen, ...).

    `labels` are shifted: position t holds the token that position t predicts, or IGNORED.
    """

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T], from 0 in each sequence."""
    labels: Tensor
    """[1, T]"""
    sequence_ids: Tensor
    """[T], which sequence a token belongs to."""
    boundaries: Tensor
    """[N + 1], int32, where each sequence begins, and T."""
    longest: int
    completion_lengths: Tensor
    """[N], float, tokens that are scored."""

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


def pack(examples: Sequence[Example], chosen_only: bool) -> PackedBatch:
    """Lays the examples' sequences end to end."""
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    boundaries = [0]
    lengths: list[int] = []
    for number, (prompt, side) in enumerate(s for example in examples for s in example.sequences(chosen_only)):
        sequence = prompt + side
        tokens += sequence
        positions += range(len(sequence))
        labels += [IGNORED] * (len(prompt) - 1) + side + [IGNORED]
        owners += [number] * len(sequence)
        boundaries.append(len(tokens))
        lengths.append(len(side))
    return PackedBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor([labels]),
        sequence_ids=torch.tensor(owners),
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        longest=max(end - start for start, end in itertools.pairwise(boundaries)),
        completion_lengths=torch.tensor(lengths, dtype=torch.float32),
    )


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch, the same on every worker."""
    return rng_of(seed, "epoch", epoch).sample(range(count), count)


def assign(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Shares items out so that the workers have about equally many tokens: the largest first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        worker = min(range(workers), key=lambda w: (load[w], w))
        shares[worker].append(item)
        load[worker] += sizes[item]
    return shares


def split_into_packs(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Groups items so that each group has at most `limit` tokens, or is one larger item."""
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
    """The packs that one worker computes of a step's items; equally many for every worker.

    Sharded workers must make the same number of forward passes. An empty pack means: compute anything, weigh it 0.
    """
    plans = [split_into_packs(share, sizes, limit) for share in assign(sizes, workers)]
    most = max(len(plan) for plan in plans)
    return plans[worker] + [[]] * (most - len(plans[worker]))


def is_validation(question_id: str, share: float, seed: int) -> bool:
    """Whether a question's pairs are kept out of training; decided by question, so that no language leaks."""
    return derive_seed(seed, "validation", question_id) / 2**31 < share
