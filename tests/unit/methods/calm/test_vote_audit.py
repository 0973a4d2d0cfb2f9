"""The audit of a vote: counts of chunks, calibration within a language, accuracy by agreement, advice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_audit import audit_of, count_audit, print_vote_audit
from calm_ray.methods.calm.voting import Ballots, elect

LANGUAGES = ["en", "fr", "sw"]


def ballots(*answers: str) -> Ballots:
    """One ballot per question and language, such as "AB-": A in en, B in fr, unparseable in sw."""
    letters = ["ABCD".find(letter) for question in answers for letter in question]
    numbers = np.arange(len(letters))
    count = len(LANGUAGES)
    return Ballots(
        [f"q{i}" for i in range(len(answers))], LANGUAGES, numbers // count, numbers % count, np.array(letters)
    )


def counts_of(answers: list[str], right: list[int]) -> Counter[str]:
    given = ballots(*answers)
    return count_audit(given, elect(given, Preferences(), 0), np.array(right))


def test_languages_vote_and_vote_without_each() -> None:
    audit = audit_of(counts_of(["AAB", "ABB", "BB-", "CAA"], [0, 0, 1, 2]))
    raw = {name: worth["accuracy"] for name, worth in audit["report"]["raw"].items()}
    assert raw == {
        "en": 1.0, "fr": 0.5, "sw": 0.0, "vote": 0.5,
        "vote without en": 0.25, "vote without fr": 0.25, "vote without sw": 0.5,
    }  # fmt: skip
    assert audit["target"] == {"accuracy": 0.5, "agreement": pytest.approx(7 / 12), "confidence": pytest.approx(0.75)}
    assert audit["report"]["raw"]["sw"]["agreement"] == pytest.approx((0 + 0.5 + 0 + 0.5) / 4)


def test_accuracy_by_agreement() -> None:
    audit = audit_of(counts_of(["AAA", "AAB", "BBA", "AB-"], [0, 0, 0, 0]))
    by_agreement = audit["by_agreement"]
    assert by_agreement["0.0"] == {"questions": 0.75, "accuracy": pytest.approx(2 / 3)}  # the last one is tied
    assert by_agreement["0.6"] == by_agreement["0.0"]
    assert by_agreement["0.7"] == by_agreement["0.9"] == {"questions": 0.25, "accuracy": 1.0}


def test_calibration_discounts_a_letter_that_a_language_favors() -> None:
    """sw always says A, which ties with en until it counts less."""
    audit = audit_of(counts_of(["B-A", "C-A", "D-A"], [1, 2, 3]))
    raw, calibrated = (audit["report"][kind]["vote"]["accuracy"] for kind in ("raw", "calibrated"))
    assert (raw, calibrated) == (0.0, 1.0)


def test_counts_of_chunks_add_up() -> None:
    first, second = ["AAA", "AAB", "BBA"], ["ABC", "CC-"]
    total = counts_of(first, [0, 0, 1])
    total.update(counts_of(second, [2, -1]))
    whole = counts_of([*first, *second], [0, 0, 1, 2, -1])
    raw = [key for key in whole if "calibrated" not in key]
    assert {key: total[key] for key in raw} == pytest.approx({key: whole[key] for key in raw})


def test_without_gold_answers_there_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    audit = audit_of(counts_of(["AAB", "ABB"], [-1, -1]))
    assert audit["by_agreement"] is None
    assert audit["target"]["accuracy"] is None
    print_vote_audit(audit, LANGUAGES)
    assert "warning" not in capsys.readouterr().out


def test_a_vote_below_a_language_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["AAA", "ABB", "ACC", "ADD", "AAB"]
    print_vote_audit(audit_of(counts_of(answers, [0] * 5)), LANGUAGES)
    printed = capsys.readouterr().out
    assert "warning: the target is right in 40.0 percent of the questions, but en (raw) in 100.0" in printed
