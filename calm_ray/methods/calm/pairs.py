"""Builds pairs of a chosen and a rejected completion in one language from a vote (CALM, section 2.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.rows import Completion, Pair, Question
from calm_ray.core.sections import PromptForm
from calm_ray.methods.calm.pairing import pair_up
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.voting import Ballots, Election
from calm_ray.methods.shared.pairs import pair_of
from calm_ray.prompts.option_text import with_choice
from calm_ray.prompts.passages import Passage, Translator
from calm_ray.prompts.questions import LETTERS, letters, prompt_text
from calm_ray.prompts.rendering import plain_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Questions = Mapping[tuple[str, str], Question]
"""(question_id, language) -> question."""


@dataclass(frozen=True)
class Draft:
    """A losing completion and a winning one, possibly in another language."""

    winner: Completion
    loser: Completion

    @property
    def is_translated(self) -> bool:
        """Whether the winner must be translated into the loser's language."""
        return self.winner["language"] != self.loser["language"]


def draft_pairs(
    completions: Sequence[Completion],
    ballots: Ballots,
    election: Election,
    preferences: Preferences,
    seed: int,
) -> list[Draft]:
    """Pairs every losing completion with up to `positives` winning ones, grouped by question.

    `ballots` must come from `completions`, in the same order.
    """
    texts = [row["text"] for row in completions]
    pairs = zip(*pair_up(ballots, election, texts, preferences, seed), strict=True)
    return [Draft(completions[winner], completions[loser]) for winner, loser in pairs]


def translate_winners(drafts: Sequence[Draft], questions: Questions, translator: Translator) -> list[str | None]:
    """The text of each draft's chosen side in the loser's language; None if the translation failed."""
    translated = [draft for draft in drafts if draft.is_translated]
    texts = iter(translator.translate([_passage(draft, questions) for draft in translated]) if translated else [])
    return [next(texts) if draft.is_translated else draft.winner["text"] for draft in drafts]


def reworded_losers(drafts: Sequence[Draft], questions: Questions) -> list[str]:
    """The text of each draft's chosen side in the loser's language, for answers in a model's own words: the losing text
    with the winning choice in place of its own."""
    return [_reworded(draft, questions) if draft.is_translated else draft.winner["text"] for draft in drafts]


def _reworded(draft: Draft, questions: Questions) -> str:
    loser, answer = draft.loser, draft.winner["answer"]
    assert answer is not None
    choices = questions[loser["question_id"], loser["language"]]["choices"]
    return with_choice(loser["text"], loser["language"], choices, LETTERS.index(answer))


def _passage(draft: Draft, questions: Questions) -> Passage:
    winner, loser = draft.winner, draft.loser
    assert winner["answer"] is not None
    question = questions[loser["question_id"], loser["language"]]
    return Passage(winner["text"], winner["language"], loser["language"], winner["answer"], letters(question))


def finish_pairs(
    drafts: Sequence[Draft],
    texts: Sequence[str | None],
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    round_number: int,
) -> list[Pair]:
    """The pairs of a chunk, numbered within each question. Drops drafts whose chosen side could not be translated.

    Sampled sides keep their tokens, including the end-of-sequence token if the model wrote one. A translated side ends
    with its winner's end-of-sequence token, unless the winner was cut for length.
    """
    pairs: list[Pair] = []
    numbers: Counter[str] = Counter()
    for draft, text in zip(drafts, texts, strict=True):
        if text is None:
            continue
        loser = draft.loser
        question_id = loser["question_id"]
        prompt = plain_prompt(tokenizer, prompt_text(questions[question_id, loser["language"]], form))
        tokens = _chosen_tokens(draft, text, tokenizer)
        chosen: Completion = {**draft.winner, "text": text, "token_ids": tokens}
        pairs.append({**pair_of(chosen, loser, prompt, numbers[question_id]), "round": round_number})
        numbers[question_id] += 1
    return pairs


def _chosen_tokens(draft: Draft, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not draft.is_translated:
        return draft.winner["token_ids"]
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    # Use the token the model stopped with: in chat models it often differs from the tokenizer's EOS.
    return [*tokens, draft.winner["token_ids"][-1]] if draft.winner["finish_reason"] == "stop" else tokens
