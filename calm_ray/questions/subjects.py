"""Questions of some subjects only."""

from __future__ import annotations

from collections.abc import Sequence

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question

SHOWN = 60
"""Subjects that an error message names; MMLU has 57."""


def of_subjects(questions: Sequence[Question], subjects: Sequence[str], field: str) -> list[Question]:
    """The questions of some subjects, in all their languages, in the order they were given in.

    A question is of a subject that any of its languages names: BMLAMA's files write subjects each in its own language.
    Raises InputError, with the name of the recipe's `field`, for a subject that no question has.
    """
    there = sorted({row["subject"] for row in questions if row["subject"] is not None})
    if unknown := [one for one in subjects if one not in there]:
        listed = ", ".join(there[:SHOWN]) + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "")
        raise InputError(f"{field}: no question is of the subject {unknown[0]!r}; there are {listed or 'no subjects'}")
    wanted = set(subjects)
    ids = {row["question_id"] for row in questions if row["subject"] in wanted}
    return [row for row in questions if row["question_id"] in ids]
