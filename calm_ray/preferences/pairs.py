"""From a vote to pairs of a chosen and a rejected completion in one language (CALM, section 2.2)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from calm_ray.config import Preferences
from calm_ray.preferences.translators import Passage, Translator
from calm_ray.preferences.voting import vote
from calm_ray.rows import Completion, Pair, Question
from calm_ray.sampling.complete import plain_prompt
from calm_ray.sampling.prompts import letters, prompt_text
from calm_ray.seeds import rng_of

Questions = Mapping[tuple[str, str], Question]
"""(question_id, language) -> question."""


@dataclass(frozen=True)
class Draft:
    """A losing completion and a winning one, which may still be in another language."""

    winner: Completion
    loser: Completion

    @property
    def is_carried(self) -> bool:
        """Whether the winner must be carried over into the loser's language."""
        return self.winner["language"] != self.loser["language"]


def draft_pairs(completions: Sequence[Completion], preferences: Preferences, seed: int) -> list[Draft]:
    """The pairs of one question: every losing completion against `positives` winning ones.

    A losing completion is a readable one with another answer than the vote's. Winning completions in its own language
    come first, then those of other languages; within each, the order is drawn by `seed`. Texts that are the same count
    once, so that the positives of a completion differ. Gold answers play no part here.
    """
    # A control: with `own_language` every language is a world of its own, votes alone and learns from itself alone.
    groups = _by_language(completions) if preferences.scope == "own_language" else {"": list(completions)}
    drafts: list[Draft] = []
    for group in groups.values():
        result = vote(group, preferences, seed)
        if result["winner"] is not None:
            drafts += _draft_group(group, result["winner"], preferences, seed)
    return drafts


def _draft_group(group: list[Completion], winner: str, preferences: Preferences, seed: int) -> list[Draft]:
    rng = rng_of(seed, "pairs", group[0]["question_id"])
    winners = [row for row in group if row["answer"] == winner]
    drafts: list[Draft] = []
    for language, rows in _by_language(group).items():
        losers = [row for row in rows if row["answer"] not in (None, winner)]
        if preferences.negatives is not None and len(losers) > preferences.negatives:
            losers = rng.sample(losers, preferences.negatives)
        for loser in losers:
            order = rng.sample(winners, len(winners))
            order.sort(key=lambda row: row["language"] != language)
            distinct = {(row["language"], row["text"]): row for row in reversed(order)}
            positives = [row for row in order if distinct[row["language"], row["text"]] is row]
            drafts += [Draft(row, loser) for row in positives[: preferences.positives]]
    return drafts


def _by_language(completions: Sequence[Completion]) -> dict[str, list[Completion]]:
    groups: dict[str, list[Completion]] = defaultdict(list)
    for row in completions:
        groups[row["language"]].append(row)
    return groups


def group_by_question(completions: Iterable[Completion]) -> dict[str, list[Completion]]:
    groups: dict[str, list[Completion]] = defaultdict(list)
    for row in completions:
        groups[row["question_id"]].append(row)
    return groups


def carry_over(drafts: Sequence[Draft], questions: Questions, translator: Translator) -> list[str | None]:
    """The text of each draft's chosen side in its loser's language; None where the translator failed."""
    carried = [draft for draft in drafts if draft.is_carried]
    texts = iter(translator.carry([_passage(draft, questions) for draft in carried]) if carried else [])
    return [next(texts) if draft.is_carried else draft.winner["text"] for draft in drafts]


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
    instruction: bool,
    round_number: int,
) -> list[Pair]:
    """The pairs of a chunk, numbered within each question. Drafts whose chosen side could not be carried are left out.

    Sampled sides keep the tokens that were sampled, with the end-of-sequence token the model wrote; a carried side ends
    in one too, unless its original was cut for length.
    """
    pairs: list[Pair] = []
    numbers: Counter[str] = Counter()
    for draft, text in zip(drafts, texts, strict=True):
        if text is None:
            continue
        winner, loser = draft.winner, draft.loser
        question_id = loser["question_id"]
        pairs.append(
            Pair(
                round=round_number,
                question_id=question_id,
                pair=numbers[question_id],
                language=loser["language"],
                prompt=plain_prompt(tokenizer, prompt_text(questions[question_id, loser["language"]], instruction)),
                chosen=text,
                rejected=loser["text"],
                prompt_token_ids=loser["prompt_token_ids"],
                chosen_token_ids=_chosen_tokens(draft, text, tokenizer),
                rejected_token_ids=loser["token_ids"],
                chosen_answer=str(winner["answer"]),
                rejected_answer=str(loser["answer"]),
                chosen_language=winner["language"],
                policy=loser["policy"],
            )
        )
        numbers[question_id] += 1
    return pairs


def _chosen_tokens(draft: Draft, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not draft.is_carried:
        return draft.winner["token_ids"]
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    # The token the model itself stopped with: chat models often end a turn with another one than the tokenizer's EOS.
    return [*tokens, draft.winner["token_ids"][-1]] if draft.winner["finish_reason"] == "stop" else tokens
