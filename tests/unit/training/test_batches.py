import random
from pathlib import Path

import pytest
from factories import pairs_stage, token_pair, tree
from hypothesis import given
from hypothesis import strategies as st

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Dialogue, table
from calm_ray.packing.batch import IGNORED, Branch, pack, packed_tokens, split_into_packs
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training.batches import (
    assign,
    epoch_order,
    is_validation,
    worker_packs,
)
from calm_ray.training.trees import Comparison, read_trees, tree_of_dialogue, tree_of_pair

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def test_supervised_training_drops_the_rejected_side() -> None:
    row = token_pair(0, random.Random(0))
    both, chosen = tree_of_pair(row), tree_of_pair(row).first(1)
    assert pack([chosen]).input_ids.tolist() == [row["prompt_token_ids"] + row["chosen_token_ids"]]
    assert [branch.tokens for branch in both.branches] == [row["chosen_token_ids"], row["rejected_token_ids"]]
    assert both.comparisons == (Comparison(0, 1),)
    assert chosen.comparisons == ()
    tokens = 2 * len(row["prompt_token_ids"]) + sum(len(branch.tokens) for branch in both.branches)
    assert packed_tokens(both, share_prompts=False) == tokens


def test_dialogue_is_one_partly_scored_branch() -> None:
    scored = [False, False, True, True, False, True]
    row = Dialogue(question_id="q", language="en", number=0, token_ids=[7, 8, 1, 2, 9, 3], scored=scored)
    found = tree_of_dialogue(row)
    assert (found.prompt, found.branches) == ([7, 8], (Branch([1, 2, 9, 3], [True, True, False, True]),))
    batch = pack([found, tree([7], [4], number=1)])
    x = IGNORED
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 9, 3, 7, 4]]
    assert batch.labels.tolist() == [[x, 1, 2, x, 3, x, 4, x]]
    assert batch.completion_lengths.tolist() == [3, 1]


def test_first_token_of_a_dialogue_is_never_scored() -> None:
    """Nothing predicts the first token of a sequence."""
    row = Dialogue(question_id="q", language="en", number=0, token_ids=[7, 8], scored=[True, True])
    assert pack([tree_of_dialogue(row)]).labels.tolist() == [[8, IGNORED]]


def test_dialogue_without_scored_tokens_is_rejected() -> None:
    row = Dialogue(question_id="q17", language="en", number=2, token_ids=[7, 8], scored=[True, False])
    with pytest.raises(CalmRayError, match="question q17 in en: no token of dialogue 2 is scored"):
        tree_of_dialogue(row)


def test_trees_are_read_from_pairs_and_dialogues(tmp_path: Path) -> None:
    pairs = pairs_stage(tmp_path / "pairs", count=3)
    assert [len(found.branches) for found in read_trees(pairs)] == [2, 2, 2]
    dialogues = Stage(Storage(str(tmp_path / "dialogues")))
    row = Dialogue(question_id="q", language="en", number=0, token_ids=[7, 8, 1], scored=[False, False, True])
    dialogues.write("00000", table(Dialogue, [row]))
    assert read_trees(dialogues) == [tree_of_dialogue(row)]
    with pytest.raises(CalmRayError, match="needs 2 branches, but row 0 has 1"):
        read_trees(dialogues)[0].first(2)


@given(SIZES, st.integers(1, 5))
def test_assign_gives_out_every_item_once_and_evenly(sizes: list[int], workers: int) -> None:
    shares = assign(sizes, workers)
    assert sorted(item for share in shares for item in share) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in share) for share in shares]
    # Largest first: no two workers differ by more than one item.
    assert max(loads) - min(loads) <= max(sizes)


@given(SIZES, st.integers(1, 100))
def test_packs_respect_the_limit_unless_one_item_exceeds_it(sizes: list[int], limit: int) -> None:
    packs = split_into_packs(list(range(len(sizes))), sizes, limit)
    assert [item for one in packs for item in one] == list(range(len(sizes)))
    assert all(len(one) == 1 or sum(sizes[item] for item in one) <= limit for one in packs)


@given(SIZES, st.integers(1, 5), st.integers(1, 100))
def test_workers_get_equally_many_packs_that_cover_all_items(sizes: list[int], workers: int, limit: int) -> None:
    plans = [worker_packs(sizes, worker, workers, limit) for worker in range(workers)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(item for plan in plans for one in plan for item in one) == list(range(len(sizes)))


def test_epoch_order_is_reproducible_and_differs_between_epochs() -> None:
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert sorted(epoch_order(50, 1, 0)) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_validation_takes_a_fraction_of_the_questions() -> None:
    drawn = [is_validation(f"q{i}", 0.06, seed=0) for i in range(5000)]
    assert 0.05 < sum(drawn) / len(drawn) < 0.07
    assert not any(is_validation(f"q{i}", 0.0, seed=0) for i in range(100))
