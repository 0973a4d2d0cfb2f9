"""How a question is put to a model, and what the answer asked for looks like."""

from __future__ import annotations

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(question: Question) -> str:
    """The letters of the question's choices: `ABCD` for four."""
    return LETTERS[: len(question["choices"])]


def question_text(question: Question) -> str:
    """The bare question with its lettered choices, one a line."""
    lines = [question["text"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip(letters(question), question["choices"], strict=True)]
    return "\n".join(lines)


def prompt_text(question: Question, instruction: bool) -> str:
    """The question as a user's message.

    With `instruction`, the language's own request to explain first and then give one letter stands before the
    question; a model that was trained on bare questions (the demo's) is asked without it, and so is a question without
    choices.
    """
    text = question_text(question)
    if not instruction or not question["choices"]:
        return text + "\n"
    language = LANGUAGES[question["language"]]
    choices = ", ".join(letters(question))
    form = completion_text(question["language"], "...", f"<{choices}>")
    return f"{language.instruction.format(letters=choices)}\n{form}\n\n{text}\n"


def completion_text(language: str, explanation: str, answer: str) -> str:
    """The form that is asked for: an explanation, then the letter (CALM, section 2.1)."""
    row = LANGUAGES[language]
    return f"{row.explanation}{row.space}{explanation}\n{row.answer}{row.space}{answer}"
