"""Small rows for tests."""

from __future__ import annotations

from calm_ray.rows import Completion, Question


def question(question_id: str = "q1", language: str = "en", choices: int = 4, gold: str | None = None) -> Question:
    return Question(
        question_id=question_id,
        language=language,
        text=f"Question {question_id}?",
        choices=[f"{language} choice {number}" for number in range(choices)],
        gold=gold,
        subject=None,
    )


def completion(
    answer: str | None,
    language: str = "en",
    sample: int = 0,
    *,
    question_id: str = "q1",
    text: str | None = None,
    finish_reason: str = "stop",
) -> Completion:
    return Completion(
        question_id=question_id,
        language=language,
        sample=sample,
        round=1,
        text=text or f"{language} says {answer} ({sample})",
        prompt_token_ids=[5, 6],
        token_ids=[10 + sample, 1] if finish_reason == "stop" else [10 + sample],
        answer=answer,
        policy="base",
        finish_reason=finish_reason,
    )


def completions(answers: dict[str, str], question_id: str = "q1") -> list[Completion]:
    """One completion for each letter of each language's string; `-` is unreadable: {"en": "AAB", "fr": "B-B"}."""
    return [
        completion(None if letter == "-" else letter, language, sample, question_id=question_id)
        for language, letters in answers.items()
        for sample, letter in enumerate(letters)
    ]
