"""Seeded splits: a question is on the same side in all its languages."""

from __future__ import annotations

import random
from collections.abc import Sequence

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question


def split_ids(count: int, train: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Splits the numbers 0 to `count` - 1 into `train` drawn ones, in the order drawn, and the others.

    With `random.Random(seed)`, reproduces the splits of DCO's repository (data/sampling.py, probe.py): the others are
    in the iteration order of a Python set. `rng` ends in the same state as there, so the next draws,
    `rng.sample(range(candidates), 2)` for each query, match too.
    """
    if not 0 < train < count:
        raise InputError(f"a split of {count} questions needs some on both sides; got train: {train}")
    drawn = rng.sample(range(count), train)
    return drawn, list(set(range(count)) - set(drawn))


def split_questions(questions: Sequence[Question], train: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Returns `train` questions (by id, in all their languages) and the others, both in input order."""
    ids = list(dict.fromkeys(row["question_id"] for row in questions))
    drawn = {ids[number] for number in split_ids(len(ids), train, random.Random(seed))[0]}
    return (
        [row for row in questions if row["question_id"] in drawn],
        [row for row in questions if row["question_id"] not in drawn],
    )


def check_disjoint(train: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Raises InputError if questions of the same files are both trained on and held out."""
    trained_on = {row["question_id"] for row in train}
    shared = list(dict.fromkeys(row["question_id"] for row in held_out if row["question_id"] in trained_on))
    if shared:
        raise InputError(
            f"questions.evaluate: {len(shared)} of its questions are also trained on, such as {shared[0]!r}; separate "
            "them by questions.align_subjects and evaluate_subjects, or drop evaluate and set questions.split"
        )
