"""Splits by seed: a question goes to one side in all its languages."""

from __future__ import annotations

import random
from collections.abc import Sequence

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question


def split_ids(count: int, train: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Of `count` questions, the numbers (from 0) of `train` drawn ones, in the order drawn, and of the others.

    With `random.Random(seed)` these are the splits of DCO's repository (data/sampling.py, probe.py): the others stand
    in the order in which a Python set of them is walked. The generator is left where that code leaves it, so that its
    next draws, `rng.sample(range(candidates), 2)` for each query, are those of that code too.
    """
    if not 0 < train < count:
        raise InputError(f"a split of {count} questions must leave some on both sides; {train} were to be drawn")
    drawn = rng.sample(range(count), train)
    return drawn, list(set(range(count)) - set(drawn))


def split_questions(questions: Sequence[Question], train: int, seed: int) -> tuple[list[Question], list[Question]]:
    """`train` questions (by id, in all their languages) and the others, both in the order they were given in."""
    ids = list(dict.fromkeys(row["question_id"] for row in questions))
    drawn = {ids[number] for number in split_ids(len(ids), train, random.Random(seed))[0]}
    return (
        [row for row in questions if row["question_id"] in drawn],
        [row for row in questions if row["question_id"] not in drawn],
    )


def refuse_shared(train: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Raises InputError for questions of the same files that would be trained on and held out, too."""
    trained_on = {row["question_id"] for row in train}
    shared = list(dict.fromkeys(row["question_id"] for row in held_out if row["question_id"] in trained_on))
    if shared:
        raise InputError(
            f"questions.evaluate: {len(shared)} of its questions are trained on, too, {shared[0]!r} for one; part them "
            "by questions.align_subjects and evaluate_subjects, or leave evaluate out and set questions.split"
        )
