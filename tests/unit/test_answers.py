import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_ray.languages import LANGUAGES
from calm_ray.sampling.answers import extract_answer
from calm_ray.sampling.prompts import completion_text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_form_that_is_asked_for_is_read_in_every_language(language: str) -> None:
    assert extract_answer(completion_text(language, "...", "C"), language, "ABCD") == "C"


@pytest.mark.parametrize(
    ("language", "text", "answer"),
    [
        ("en", "Explanation: x\nAnswer: B", "B"),
        ("en", "Answer: D. schools", "D"),
        ("en", "answer: (c)", "C"),
        ("en", "**Answer**: **C**", "C"),
        ("en", "**Answer: C**", "C"),
        ("en", "Answer: b)", "B"),
        ("en", "Answer: b", "B"),
        ("en", "Answer:\n\n`A`", "A"),
        ("en", "Answer: A\n...\nAnswer: B", "B"),
        ("en", "Answer: A\nAnswer: neither", "A"),
        ("en", "Answer: E", None),
        ("en", "Answer: a good one", None),
        ("en", "Answer: Both", None),
        ("en", "B", None),
        ("en", "Explanation", None),
        ("en", "", None),
        ("en", "I cannot answer this question.", None),
        ("zh", "解释：……\n答案：B", "B"),
        ("zh", "答案:Ｂ", "B"),
        ("zh", "答案：（C）", "C"),
        ("fr", "Réponse : D. sel", "D"),
        ("fr", "réponse: «A»", "A"),
        ("de", "Antwort: Beide sind richtig", None),
        ("de", "Antwort: B. Beide", "B"),
        ("ja", "説明：…\n答え：「A」", "A"),
        ("ar", "الشرح: ...\nالإجابة: (A)", "A"),
        ("ru", "Ответ: С", None),  # a Cyrillic letter is not one of the question's
        ("ko", "정답: D", "D"),
    ],
)
def test_answers(language: str, text: str, answer: str | None) -> None:
    assert extract_answer(text, language, "ABCD") == answer


@given(st.text(), st.sampled_from(list(LANGUAGES)), st.integers(2, 10))
def test_extraction_never_raises_and_returns_a_letter_of_the_question_or_nothing(
    text: str, language: str, choices: int
) -> None:
    letters = "ABCDEFGHIJ"[:choices]
    for given_text in (text, f"{LANGUAGES[language].answer} {text}"):
        assert extract_answer(given_text, language, letters) in [*letters, None]
