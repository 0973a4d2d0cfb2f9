"""Packed batches: the tokens of many prompts and their branches in one row, without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Label of unscored positions."""


@dataclass(frozen=True)
class Branch:
    """One continuation of a prompt."""

    tokens: list[int]
    scored: list[bool] | None = None
    """Mask of the scored tokens; None scores all of them."""

    @property
    def scored_tokens(self) -> int:
        return len(self.tokens) if self.scored is None else sum(self.scored)


class Row(Protocol):
    """A prompt with its branches."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def branches(self) -> tuple[Branch, ...]: ...


@dataclass(frozen=True)
class PackedBatch:
    """N branches in row order, in blocks that do not see each other; T tokens in all.

    A block is a branch after its own copy of the prompt or, with shared prompts, a prompt with all its branches: first
    the prompt without its last token, then each branch after that last token, which predicts the branch's first one.

    `labels` are shifted: position t holds the token that position t predicts, or IGNORED.
    """

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T], from 0 in each branch with its prompt."""
    labels: Tensor
    """[1, T]"""
    sequence_ids: Tensor
    """[T], the branch of each token; any of its branches for a shared prompt."""
    segments: Tensor | None
    """[T], 0 in a shared prompt, 1, 2, ... in its branches, -1 in blocks of a single branch; None if no prompt is
    shared."""
    boundaries: Tensor
    """[blocks + 1], int32, the start of each block, then T."""
    longest: int
    """Tokens of the longest block."""
    completion_lengths: Tensor
    """[N], float, number of scored tokens."""

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


def packed_tokens(row: Row, *, share_prompts: bool) -> int:
    """Returns the number of tokens that `pack` lays out for a row."""
    branches = sum(len(branch.tokens) for branch in row.branches)
    if share_prompts and _is_shared(row):
        return len(row.prompt) - 1 + branches + len(row.branches)
    return len(row.prompt) * len(row.branches) + branches


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


def _is_shared(row: Row) -> bool:
    return len(row.branches) > 1 and len(row.prompt) > 1


def pack(rows: Sequence[Row], *, share_prompts: bool = False) -> PackedBatch:
    """Concatenates the rows' branches, each after its own copy of the prompt or, with `share_prompts`, with one prompt
    for all branches of a row."""
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    segments: list[int] = []
    boundaries = [0]
    lengths: list[int] = []

    def add(part: list[int], first: int, predicts: list[int], owner: int, segment: int) -> None:
        tokens.extend(part)
        positions.extend(range(first, first + len(part)))
        labels.extend(predicts)
        owners.extend([owner] * len(part))
        segments.extend([segment] * len(part))

    for row in rows:
        shared = share_prompts and _is_shared(row)
        prefix = row.prompt[:-1] if shared else []
        add(prefix, 0, [IGNORED] * len(prefix), len(lengths), 0)
        for number, branch in enumerate(row.branches, start=1):
            own = row.prompt[len(prefix) :]
            predicts = [IGNORED] * (len(own) - 1) + _labels(branch) + [IGNORED]
            add(own + branch.tokens, len(prefix), predicts, len(lengths), number if shared else -1)
            lengths.append(branch.scored_tokens)
            if not shared:
                boundaries.append(len(tokens))
        if shared:
            boundaries.append(len(tokens))
    return PackedBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor([labels]),
        sequence_ids=torch.tensor(owners),
        segments=torch.tensor(segments) if max(segments, default=-1) >= 0 else None,
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        longest=max(end - start for start, end in itertools.pairwise(boundaries)),
        completion_lengths=torch.tensor(lengths, dtype=torch.float32),
    )


def _labels(branch: Branch) -> list[int]:
    """The branch's tokens, IGNORED where unscored."""
    if branch.scored is None:
        return branch.tokens
    return [token if scored else IGNORED for token, scored in zip(branch.tokens, branch.scored, strict=True)]
