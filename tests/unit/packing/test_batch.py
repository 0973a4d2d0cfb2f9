"""Packed batches: their layout, and attention over them."""

import random
from dataclasses import dataclass

import pytest
import torch
from factories import tree

from calm_ray.packing.attention import arguments, varlen_attention
from calm_ray.packing.batch import IGNORED, Branch, PackedBatch, Row, pack, packed_tokens


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    branches: tuple[Branch, ...]


def test_packed_layout() -> None:
    batch = pack([tree([7, 8], [1, 2], [3]), tree([9], [4], [5], number=1)])
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 7, 8, 3, 9, 4, 9, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1]]
    # Position t is labeled with the token it predicts; prompts and sequence ends are not scored.
    x = IGNORED
    assert batch.labels.tolist() == [[x, 1, 2, x, x, 3, x, 4, x, 5, x]]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert batch.segments is None
    assert batch.boundaries.tolist() == [0, 4, 7, 9, 11]
    assert batch.longest == 4
    assert batch.completion_lengths.tolist() == [2, 1, 1, 1]


def test_layout_with_shared_prompts() -> None:
    """A prompt once, without its last token, which comes before each branch."""
    rows: list[Row] = [tree([7, 8], [1, 2], [3]), Question([6, 9], (Branch([4]),)), tree([9], [4], [5], number=1)]
    batch = pack(rows, share_prompts=True)
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 8, 3, 6, 9, 4, 9, 4, 9, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 0, 1, 2, 0, 1, 0, 1]]
    x = IGNORED
    assert batch.labels.tolist() == [[x, 1, 2, x, 3, x, x, 4, x, 4, x, 5, x]]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert batch.segments is not None
    assert batch.segments.tolist() == [0, 1, 1, 1, 2, 2, -1, -1, -1, -1, -1, -1, -1]
    assert batch.boundaries.tolist() == [0, 6, 9, 11, 13]
    assert batch.longest == 6
    assert batch.completion_lengths.tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("share", [False, True])
def test_pack_handles_any_lengths(share: bool) -> None:
    rng = random.Random(0)
    trees = [tree(*([9] * rng.randint(1, 9) for _ in range(3))) for _ in range(20)]
    batch = pack(trees, share_prompts=share)
    assert batch.input_ids.shape[1] == sum(packed_tokens(each, share_prompts=share) for each in trees)
    assert int((batch.labels != IGNORED).sum()) == int(batch.completion_lengths.sum())
    assert torch.bincount(batch.sequence_ids).sum() == batch.boundaries[-1]


def attend(batch: PackedBatch, window: int | None) -> dict[int, torch.Tensor]:
    """Output at the last token of each branch, with queries, keys and values that depend on token and position."""
    torch.manual_seed(0)
    table = torch.randn(10, 12, 3, 4, 8)
    tokens, positions = batch.input_ids[0], batch.position_ids[0]
    q, k, v = table[tokens, positions].permute(1, 2, 0, 3)[:, None]
    k, v = k[:, :2], v[:, :2]  # grouped heads
    output, _ = varlen_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.5, sliding_window=window, **arguments(batch)
    )
    ends = {int(branch): number for number, branch in enumerate(batch.sequence_ids)}
    return {branch: output[0, end] for branch, end in ends.items()}


@pytest.mark.parametrize("window", [None, 2, 4])
def test_attention_is_the_same_with_shared_prompts(window: int | None) -> None:
    rng = random.Random(0)
    rows = [
        Question(
            [rng.randrange(10) for _ in range(rng.randint(1, 5))],
            tuple(Branch([rng.randrange(10) for _ in range(rng.randint(1, 4))]) for _ in range(rng.randint(1, 4))),
        )
        for _ in range(10)
    ]
    alone, shared = (attend(pack(rows, share_prompts=share), window) for share in (False, True))
    assert alone.keys() == shared.keys()
    for branch, output in alone.items():
        assert torch.allclose(output, shared[branch], atol=1e-6)
