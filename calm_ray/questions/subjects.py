"""Selects questions by subject."""

from __future__ import annotations

from collections.abc import Sequence

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question

SHOWN = 60
"""Maximum number of subjects listed in an error message; MMLU has 57."""


def select_subjects(questions: Sequence[Question], subjects: Sequence[str], field: str) -> list[Question]:
    """Returns the questions of some subjects, in all their languages, in input order.

    A question belongs to every subject that one of its languages names: BMLAMA's files translate subject names.
    Raises InputError, naming the recipe's `field`, for a subject that no question has.
    """
    present = sorted({row["subject"] for row in questions if row["subject"] is not None})
    if unknown := [one for one in subjects if one not in present]:
        listed = ", ".join(present[:SHOWN]) + (f" and {len(present) - SHOWN} more" if len(present) > SHOWN else "")
        raise InputError(f"{field}: no question has the subject {unknown[0]!r}; there are {listed or 'no subjects'}")
    wanted = set(subjects)
    ids = {row["question_id"] for row in questions if row["subject"] in wanted}
    return [row for row in questions if row["question_id"] in ids]
