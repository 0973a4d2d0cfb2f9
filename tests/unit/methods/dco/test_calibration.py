"""Calibration: what a candidate's form, length and frequency contribute to its score in a language."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from factories import scored

from calm_ray.core.rows import Scored, table
from calm_ray.evaluation.scores import scores_of
from calm_ray.methods.dco.calibration import calibrated, candidate_sums, mean_recurrence, means_of


def rows(*questions: tuple[dict[str, float], str | None], language: str = "fr") -> dict[str, pa.Table]:
    """A question for each mapping of candidates to log-probabilities, with its subject."""
    found: list[Any] = [
        scored(list(logps.values()), f"q{i}", language, choices=list(logps), subject=subject)
        for i, (logps, subject) in enumerate(questions)
    ]
    return {language: table(Scored, found)}


def test_a_candidate_is_compared_with_its_own_mean() -> None:
    """The long name always looks unlikely; where it looks least so, it is the answer."""
    data = rows(
        ({"euro": -1.0, "dirham marocain": -9.0}, None),
        ({"euro": -2.0, "dirham marocain": -5.0}, None),
    )  # fmt: skip
    means = means_of(candidate_sums(data), prior=0)
    assert means == {"fr": {"": {"euro": -1.5, "dirham marocain": -7.0}}}
    scores = scores_of(data)
    assert scores.answers.tolist() == [[0, 0]]
    after = calibrated(scores, data, means)
    assert after.logps.tolist() == [[[0.5, -2.0], [-0.5, 2.0]]]
    assert after.answers.tolist() == [[0, 1]]


def test_means_are_by_subject_and_add_up_over_chunks() -> None:
    first = rows(({"A": -1.0, "B": -3.0}, "history"), ({"A": -5.0, "B": -5.0}, "law"))
    second = rows(({"A": -3.0, "B": -1.0}, "history"))
    sums = candidate_sums(first)
    sums.update(candidate_sums(second))
    assert means_of(sums, prior=0) == {"fr": {"history": {"A": -2.0, "B": -2.0}, "law": {"A": -5.0, "B": -5.0}}}
    assert mean_recurrence(sums) == pytest.approx(6 / 4)


def test_means_of_few_questions_are_shrunk_toward_their_subject() -> None:
    data = rows(({"A": -1.0, "B": -3.0}, None), ({"A": -2.0, "C": -6.0}, None))  # -3 in the mean
    means = means_of(candidate_sums(data), prior=1)["fr"][""]
    assert means == pytest.approx({"A": (-1 - 2 - 3) / 3, "B": (-3 - 3) / 2, "C": (-6 - 3) / 2})


def test_unseen_candidates_take_the_mean_of_their_subject() -> None:
    means = {"fr": {"": {"euro": -1.0, "yen": -3.0}}}
    held_out = rows(({"euro": -1.0, "won": -4.0}, None), ({"rand": -4.0, "yen": -3.0}, "unknown subject"))
    after = calibrated(scores_of(held_out), held_out, means)
    assert after.logps.tolist() == [[[0.0, -2.0], [-4.0, -3.0]]]


def test_questions_with_fewer_candidates_stay_padded() -> None:
    data = rows(({"A": -1.0, "B": -2.0, "C": -3.0}, None), ({"A": -3.0, "B": -2.0}, None))
    after = calibrated(scores_of(data), data, means_of(candidate_sums(data), prior=0))
    assert after.logps[0].tolist() == [[1.0, 0.0, 0.0], [-1.0, 0.0, -np.inf]]
