"""Candidate answers to a question as text and tokens, for a policy to score.

Candidates are parallel by index across languages, like a question's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.errors import BadRow
from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import CandidateSet, Question
from calm_ray.prompts.questions import LETTERS, letters, question_text
from calm_ray.prompts.rendering import encode_prompt, plain_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "<mask>"
"""The placeholder for the answer in a cloze."""


@dataclass(frozen=True)
class Asked:
    """A question as text: the prompt, and the candidates by themselves (`choices`) and as they follow it (`texts`)."""

    prompt: str
    choices: list[str]
    texts: list[str]


@dataclass(frozen=True)
class CandidateForm:
    """How to build candidates from questions. Picklable."""

    write: Callable[[Question], Asked]
    chat: bool = False
    """Whether to use the model's chat template."""

    def of(self, question: Question, tokenizer: PreTrainedTokenizerBase) -> CandidateSet:
        """Raises BadRow if a candidate has no tokens, or two candidates are identical."""
        return tokenized(question, self.write(question), tokenizer, chat=self.chat)


def as_letters(question: Question) -> Asked:
    """The question with its lettered choices and the answer marker, followed by a letter."""
    language = LANGUAGES[question["language"]]
    own = list(letters(question))
    return Asked(f"{question_text(question)}\n{language.answer}", own, [f"{language.space}{one}" for one in own])


def as_choices(question: Question) -> Asked:
    """The question, or a cloze up to its mask, followed by a choice and the rest of the cloze."""
    before, mask, after = question["text"].partition(MASK)
    space = before[len(before.rstrip()) :] if mask else LANGUAGES[question["language"]].space
    texts = [f"{space}{choice}{after}" for choice in question["choices"]]
    return Asked(before.rstrip(), list(question["choices"]), texts)


def as_answers(question: Question) -> Asked:
    """The question and the answer marker, followed by a choice."""
    language = LANGUAGES[question["language"]]
    texts = [f"{language.space}{choice}" for choice in question["choices"]]
    return Asked(f"{question['text']}\n{language.answer}", list(question["choices"]), texts)


FORMS: dict[str, Callable[[Question], Asked]] = {"letters": as_letters, "choices": as_choices, "answers": as_answers}
"""Forms that need only the question."""


def tokenized(question: Question, asked: Asked, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> CandidateSet:
    """Tokenizes a question's candidates.

    A candidate's tokens are those that prompt plus candidate have beyond the prompt's. If tokens merge across the
    boundary, the candidate is tokenized by itself. An empty prompt becomes a beginning-of-sequence token.
    """
    if chat:
        prompt, ids = plain_prompt(tokenizer, asked.prompt), encode_prompt(tokenizer, asked.prompt)
        texts = [text.strip() for text in asked.texts]
        sides = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    else:
        prompt, texts = asked.prompt, asked.texts
        ids = list(tokenizer.encode(prompt)) or [_first_token(tokenizer)]
        sides = [_side(ids, prompt, text, tokenizer) for text in texts]
    _check(asked, sides)
    gold = question["gold"]
    return CandidateSet(
        question_id=question["question_id"],
        language=question["language"],
        subject=question["subject"],
        prompt=prompt,
        prompt_token_ids=ids,
        choices=asked.choices,
        texts=texts,
        token_ids=sides,
        right=LETTERS.index(gold) if gold is not None else None,
    )


def _side(ids: list[int], prompt: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    whole = list(tokenizer.encode(prompt + text))
    if prompt and whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Stands in for an empty prompt, as in lm-evaluation-harness."""
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


def _check(asked: Asked, sides: Sequence[list[int]]) -> None:
    texts: dict[str, int] = {}
    tokens: dict[tuple[int, ...], int] = {}
    for number, (choice, side) in enumerate(zip(asked.choices, sides, strict=True)):
        if not side:
            raise BadRow("a candidate has no tokens in the model's tokenizer", f"{label(number)}, {choice!r}")
        if (first := texts.setdefault(choice.strip(), number)) != number:
            both = f"{label(first)} and {label(number)}, {choice.strip()!r}"
            raise BadRow("two candidates are identical", both)
        if (first := tokens.setdefault(tuple(side), number)) != number:
            both = f"{label(first)} and {label(number)}, {asked.choices[first]!r} and {choice!r}"
            raise BadRow("two candidates are identical to the model's tokenizer", both)


def label(number: int) -> str:
    """Returns the name of a candidate by index: its letter or, after Z, its number."""
    return LETTERS[number] if number < len(LETTERS) else str(number + 1)
