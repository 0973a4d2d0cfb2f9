"""Prompts for questions, and the form of the requested answer."""

from __future__ import annotations

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import Question
from calm_ray.core.sections import PromptForm

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letters(question: Question) -> str:
    """Returns the letters of the question's choices: `ABCD` for four."""
    return LETTERS[: len(question["choices"])]


def question_text(question: Question) -> str:
    """Returns the bare question with its lettered choices, one per line."""
    lines = [question["text"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip(letters(question), question["choices"], strict=True)]
    return "\n".join(lines)


def prompt_text(question: Question, form: PromptForm) -> str:
    """Returns the question as a user message, in a form of `sampling.prompt`.

    Questions without choices are never asked for a letter.
    """
    if form == "question":
        return question["text"]
    text = question_text(question)
    if form == "choices" or not question["choices"]:
        return text + "\n"
    language = LANGUAGES[question["language"]]
    choices = ", ".join(letters(question))
    requested = completion_text(question["language"], "...", f"<{choices}>")
    return f"{language.instruction.format(letters=choices)}\n{requested}\n\n{text}\n"


def completion_text(language: str, explanation: str, answer: str) -> str:
    """Returns a completion in the requested form: an explanation, then the letter (CALM, section 2.1)."""
    row = LANGUAGES[language]
    return f"{row.explanation}{row.space}{explanation}\n{row.answer}{row.space}{answer}"
