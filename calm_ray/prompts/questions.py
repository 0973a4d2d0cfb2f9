"""Prompts for questions, and the form of the requested answer."""

from __future__ import annotations

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(question: Question) -> str:
    """Returns the letters of the question's choices: `ABCD` for four."""
    return LETTERS[: len(question["choices"])]


def question_text(question: Question) -> str:
    """Returns the bare question with its lettered choices, one per line."""
    lines = [question["text"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip(letters(question), question["choices"], strict=True)]
    return "\n".join(lines)


def prompt_text(question: Question, instruction: bool) -> str:
    """Returns the question as a user message.

    `instruction` puts a request in the question's language before it: explain first, then give one letter. Omit it for
    models trained on bare questions (the demo's); questions without choices never get it.
    """
    text = question_text(question)
    if not instruction or not question["choices"]:
        return text + "\n"
    language = LANGUAGES[question["language"]]
    choices = ", ".join(letters(question))
    form = completion_text(question["language"], "...", f"<{choices}>")
    return f"{language.instruction.format(letters=choices)}\n{form}\n\n{text}\n"


def completion_text(language: str, explanation: str, answer: str) -> str:
    """Returns a completion in the requested form: an explanation, then the letter (CALM, section 2.1)."""
    row = LANGUAGES[language]
    return f"{row.explanation}{row.space}{explanation}\n{row.answer}{row.space}{answer}"
