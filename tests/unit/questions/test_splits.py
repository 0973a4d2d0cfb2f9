"""Exact splits of DCO's repository. Expected values come from its own code (data/sampling.py) on Python 3.11."""

import random
from typing import Any

import pytest
from factories import question

from calm_ray.core.errors import InputError
from calm_ray.questions.splits import split_ids, split_questions

CASES: list[dict[str, Any]] = [
    {
        "data": "MMMLU", "count": 14042, "train": 5000, "seed": 0, "sum": 34732246, "candidates": 4,
        "drawn": [13835, 6311, 12418, 6890, 663, 4242, 8376, 7961, 6634, 12841],
        "others": [0, 5, 9, 12, 14, 15, 23, 25, 27, 28], "pairs": [[2, 1], [3, 2], [1, 3], [1, 2], [1, 3]],
    },
    {
        "data": "MMMLU", "count": 14042, "train": 5000, "seed": 1, "sum": 35057200, "candidates": 4,
        "drawn": [2201, 9325, 13884, 13144, 12513, 1033, 4179, 1931, 8117, 12467],
        "others": [0, 1, 2, 3, 4, 5, 6, 7, 8, 11], "pairs": [[2, 3], [0, 1], [2, 0], [1, 3], [3, 2]],
    },
    {
        "data": "XCSQA", "count": 1000, "train": 800, "seed": 0, "sum": 398568, "candidates": 5,
        "drawn": [864, 394, 776, 911, 430, 41, 265, 988, 523, 497],
        "others": [513, 514, 517, 6, 521, 530, 21, 25, 538, 539], "pairs": [[1, 3], [2, 4], [0, 1], [3, 2], [4, 0]],
    },
    {
        "data": "XCSQA", "count": 1000, "train": 800, "seed": 1, "sum": 401256, "candidates": 5,
        "drawn": [137, 582, 867, 821, 782, 64, 261, 120, 507, 779],
        "others": [515, 4, 7, 11, 13, 19, 23, 25, 543, 34], "pairs": [[3, 2], [1, 0], [4, 0], [2, 4], [3, 2]],
    },
    {
        "data": "BMLAMA-17", "count": 6792, "train": 5000, "seed": 0, "sum": 17020628, "candidates": 10,
        "drawn": [3155, 6209, 3445, 331, 2121, 4188, 3980, 3317, 6420, 2484],
        "others": [7, 10, 14, 18, 23, 24, 35, 37, 38, 39], "pairs": [],
    },
    {
        "data": "BMLAMA-17", "count": 6792, "train": 5000, "seed": 1, "sum": 17142628, "candidates": 10,
        "drawn": [1100, 4662, 6572, 6256, 516, 2089, 965, 4058, 6233, 3682],
        "others": [0, 1, 3, 8, 9, 10, 13, 22, 23, 26], "pairs": [],
    },
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['data']}-{case['seed']}")
def test_dco_splits_and_later_draws_are_reproduced(case: dict[str, Any]) -> None:
    rng = random.Random(case["seed"])
    drawn, others = split_ids(case["count"], case["train"], rng)
    assert drawn[:10] == case["drawn"]
    assert sum(drawn) == case["sum"]
    assert len(others) == case["count"] - case["train"]
    assert others[:10] == case["others"]
    assert set(drawn) | set(others) == set(range(case["count"]))
    assert [rng.sample(range(case["candidates"]), 2) for _ in case["pairs"]] == case["pairs"]


def test_question_is_on_the_same_side_in_all_languages() -> None:
    rows = [question(f"q{i}", code) for i in range(50) for code in ("en", "fr", "zh")]
    train, test = split_questions(rows, 30, seed=3)
    assert [f"q{i}" for i in sorted(split_ids(50, 30, random.Random(3))[0])] == [
        row["question_id"] for row in train if row["language"] == "fr"
    ]
    assert len(train) == 90
    assert not {row["question_id"] for row in train} & {row["question_id"] for row in test}
    assert sorted([*train, *test], key=rows.index) == rows
    assert split_questions(rows, 30, seed=4) != (train, test)


@pytest.mark.parametrize("train", [0, 50, 51])
def test_split_with_an_empty_side_is_refused(train: int) -> None:
    with pytest.raises(InputError, match="needs some on both sides"):
        split_ids(50, train, random.Random(0))
