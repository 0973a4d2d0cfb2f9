"""Answers in a model's own words: which choice a text names, and the same text with another one."""

from __future__ import annotations

import pytest

from calm_ray.core.errors import InputError
from calm_ray.prompts.extraction import read_answers
from calm_ray.prompts.option_text import named_choice, with_choice

CURRENCIES = ["US Dollar", "Euro", "Franc", "CFA Franc"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Euro", 1),
        ("The official currency of France is the euro (EUR).", 1),
        ("The US Dollar.", 0),
        ("It uses the dollar.", 0),  # a word of its own
        ("The Franc", 2),
        ("The CFA Franc", 3),  # contains another choice
        ("The CFA", 3),
        ("Neuro, Euros", None),  # parts of words
        ("The euro replaced the franc.", None),
        ("The yen", None),
        ("", None),
    ],
)
def test_text_names_one_choice(text: str, named: int | None) -> None:
    assert named_choice(text, "en", CURRENCIES) == named


def test_scripts_without_spaces() -> None:
    assert named_choice("日本的首都是东京。", "zh", ["东京", "北京"]) == 0
    assert named_choice("首都は東京です", "ja", ["東京", "京都"]) == 0


def test_case_and_compatibility_forms_are_ignored() -> None:
    assert named_choice("ＥＵＲＯ", "fr", ["Euro", "Franc"]) == 0
    assert named_choice("Die Währung ist der schweizer franken", "de", ["Euro", "Schweizer Franken"]) == 1


def test_answers_are_letters() -> None:
    texts = ["The euro.", "I do not know.", "dollar"]
    assert read_answers("option_text", texts, "en", CURRENCIES) == ["B", None, "A"]


@pytest.mark.parametrize(
    ("text", "new", "expected"),
    [
        ("Its currency is the Euro.", 0, "Its currency is the US Dollar."),
        ("Its currency is the dollar.", 1, "Euro"),  # does not name the choice in full
        ("Who knows?", 1, "Euro"),
        ("Euro, yes: the euro.", 3, "CFA Franc, yes: the CFA Franc."),
    ],
)
def test_text_with_another_choice(text: str, new: int, expected: str) -> None:
    assert with_choice(text, "en", CURRENCIES, new) == expected


def test_choices_with_special_characters() -> None:
    assert named_choice("It is (a+b)*c.", "en", ["(a+b)*c", "(a-b)*c"]) == 0
    assert with_choice(r"is \1", "en", [r"\1", r"\2"], 1) == r"is \2"


def test_unknown_language_is_rejected() -> None:
    with pytest.raises(InputError, match="'xx' is not in the language table"):
        named_choice("Euro", "xx", CURRENCIES)
