"""Candidates out of a policy's own samples, in any language: for DCO on questions without options (online DCO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from calm_ray.core.rows import CandidateSet, Completion, Question
from calm_ray.core.seeds import rng_of
from calm_ray.prompts.passages import Passage, Translator
from calm_ray.prompts.questions import letters, prompt_text
from calm_ray.prompts.rendering import encode_prompt, plain_prompt

ByLanguage = Mapping[str, Question]


@dataclass(frozen=True)
class Carried:
    """One candidate in every language, and the completion that it was."""

    texts: dict[str, str]
    own: Completion

    def tokens(self, language: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What was sampled in a language keeps its tokens; what was carried into it ends as its original did."""
        own = self.own
        if own["language"] == language:
            return own["token_ids"]
        ended = own["token_ids"][-1:] if own["finish_reason"] == "stop" else []
        return [*tokenizer.encode(self.texts[language], add_special_tokens=False), *ended]


def draw(completions: Sequence[Completion], most: int, seed: int, round_number: int) -> list[Completion]:
    """Up to `most` completions of one question that differ: in their answer, where it can be read, else in their text.

    Drawn at random, so that a frequent answer is likely in; which of those that give it stands for it is drawn too.
    """
    if not completions:
        return []
    rng = rng_of(seed, "candidates", round_number, completions[0]["question_id"])
    different: dict[tuple[bool, str], Completion] = {}
    for one in rng.sample(completions, len(completions)):
        if text := one["text"].strip():
            answer = one["answer"]
            different.setdefault((answer is None, answer or text), one)
    return list(different.values())[:most]


def carry(
    drawn: Mapping[str, Sequence[Completion]], questions: Mapping[str, ByLanguage], translator: Translator
) -> dict[str, list[Carried]]:
    """Each question's candidates in all its languages.

    One that could not be carried into every language is left out, and so is one that is the same as an earlier one in
    some language.
    """
    asked = [
        (key, number, code)
        for key, own in drawn.items()
        for number, one in enumerate(own)
        for code in questions[key]
        if code != one["language"]
    ]
    passages = []
    for key, number, code in asked:
        one = drawn[key][number]
        passages.append(Passage(one["text"], one["language"], code, one["answer"], letters(questions[key][code])))
    texts: dict[tuple[str, int, str], str | None] = dict(zip(asked, translator.carry(passages), strict=True))
    return {
        key: _different(
            [
                ({code: texts.get((key, number, code), one["text"]) for code in questions[key]}, one)
                for number, one in enumerate(own)
            ]
        )
        for key, own in drawn.items()
    }


def _different(candidates: Sequence[tuple[dict[str, str | None], Completion]]) -> list[Carried]:
    """Those of one question's candidates that are there, and new, in every language."""
    kept: list[Carried] = []
    for texts, own in candidates:
        complete = {code: text for code, text in texts.items() if text is not None}
        taken = any(other.texts[code].strip() == text.strip() for other in kept for code, text in complete.items())
        if len(complete) == len(texts) and not taken:
            kept.append(Carried(complete, own))
    return kept


def candidate_sets(
    questions: ByLanguage,
    carried: Sequence[Carried],
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: bool,
    context_tokens: int | None,
) -> list[CandidateSet]:
    """A question's candidates in each language; none where fewer than two are left.

    A candidate that is no token in some language, or fills the engines' context there together with its prompt, is left
    out of all.
    """
    messages = {code: prompt_text(question, instruction) for code, question in questions.items()}
    prompts = {code: encode_prompt(tokenizer, message) for code, message in messages.items()}
    tokens = [{code: one.tokens(code, tokenizer) for code in questions} for one in carried]

    def fits(sides: Mapping[str, list[int]]) -> bool:
        lengths = [len(prompts[code]) + len(side) for code, side in sides.items()]
        return all(sides.values()) and (context_tokens is None or max(lengths) < context_tokens)

    kept = [(one, sides) for one, sides in zip(carried, tokens, strict=True) if fits(sides)]
    if len(kept) < 2:
        return []
    return [
        CandidateSet(
            question_id=question["question_id"],
            language=code,
            prompt=plain_prompt(tokenizer, messages[code]),
            prompt_token_ids=prompts[code],
            choices=[one.texts[code] for one, _ in kept],
            texts=[one.texts[code] for one, _ in kept],
            token_ids=[sides[code] for _, sides in kept],
            right=_right(question, [one for one, _ in kept]),
        )
        for code, question in questions.items()
    ]


def _right(question: Question, carried: Sequence[Carried]) -> int | None:
    """Index of the candidate that gives the right answer; None where none does, or it is not known."""
    answers = [one.own["answer"] for one in carried]
    gold = question["gold"]
    return answers.index(gold) if gold is not None and gold in answers else None
