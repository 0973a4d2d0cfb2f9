"""Answers read from completions, as letters of their question's choices."""

import pytest

from calm_ray.prompts.extraction import read_answers


@pytest.mark.parametrize("extraction", ["strict", "released"])
def test_letters_beyond_the_choices_are_no_answers(extraction: str) -> None:
    texts = ["Answer: C", "Answer: D", "Answer: E", "no idea"]
    assert read_answers(extraction, texts, "en", ["red", "green", "blue"]) == ["C", None, None, None]
    assert read_answers(extraction, texts, "en", ["red", "green", "blue", "white"]) == ["C", "D", None, None]


def test_questions_without_choices_have_no_answers() -> None:
    assert read_answers("strict", ["Answer: A"], "en", []) == [None]
