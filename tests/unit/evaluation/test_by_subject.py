"""Held-out answers by subject."""

import pytest

from calm_ray.core.console import console
from calm_ray.evaluation.by_subject import subject_report, subject_tables

SUBJECTS = {"q1": "currency", "q2": "currency", "q3": "capital"}
GOLD = {"q1": "A", "q2": "B", "q3": "C"}


def answers(en: str, fr: str) -> dict[tuple[str, str], str | None]:
    return {
        (language, f"q{number}"): None if letter == "-" else letter
        for language, letters in (("en", en), ("fr", fr))
        for number, letter in enumerate(letters, start=1)
    }


def test_each_subject_is_reported() -> None:
    report = subject_report(answers("AB-", "AAC"), SUBJECTS, GOLD)
    assert report == {
        "capital": {"questions": 1, "accuracy": {"en": 0.0, "fr": 1.0}, "consistency": 0.0},
        "currency": {"questions": 2, "accuracy": {"en": 1.0, "fr": 0.5}, "consistency": 0.5},
    }


def test_one_subject_or_none_is_no_report() -> None:
    assert subject_report(answers("AB", "AB"), {"q1": "x", "q2": "x"}, GOLD) == {}
    assert subject_report(answers("AB", "AB"), {}, GOLD) == {}


def test_without_gold_answers_only_consistency_is_known() -> None:
    report = subject_report(answers("ABC", "ABC"), SUBJECTS, {})
    assert report["capital"] == {"questions": 1, "accuracy": None, "consistency": 1.0}


def test_table_has_first_and_last_round(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [
        {
            "round": number,
            "accuracy": {"en": 0.5, "fr": 0.5},
            "by_subject": subject_report(answers(en, "AAC"), SUBJECTS, GOLD),
        }
        for number, en in enumerate(("---", "A--", "ABC"))
    ]
    (table,) = subject_tables(rounds)
    console.print(table)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["currency", "2", "0", "0.0", "50.0", "25.0", "0.0"] in rows
    assert ["2", "100.0", "50.0", "75.0", "50.0"] in rows
    assert not list(subject_tables([{"round": 0}]))
