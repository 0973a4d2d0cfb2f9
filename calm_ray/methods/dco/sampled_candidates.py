"""Candidates from a policy's own samples in any language, for DCO on questions without choices (online DCO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from calm_ray.core.rows import CandidateSet, Completion, Question
from calm_ray.core.sections import PromptForm
from calm_ray.core.seeds import rng_of
from calm_ray.prompts.passages import Passage, Translator
from calm_ray.prompts.questions import letters, prompt_text
from calm_ray.prompts.rendering import encode_prompt, plain_prompt

ByLanguage = Mapping[str, Question]


@dataclass(frozen=True)
class Translated:
    """One candidate in every language, and the completion it comes from."""

    texts: dict[str, str]
    original: Completion

    def tokens(self, language: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Keeps sampled tokens; a translation gets the end-of-sequence token of its original, if there is one."""
        original = self.original
        if original["language"] == language:
            return original["token_ids"]
        ending = original["token_ids"][-1:] if original["finish_reason"] == "stop" else []
        return [*tokenizer.encode(self.texts[language], add_special_tokens=False), *ending]


def draw(completions: Sequence[Completion], most: int, seed: int, round_number: int) -> list[Completion]:
    """Draws up to `most` completions of one question with distinct answers (distinct texts if unparseable).

    The draw is random over completions, which favors frequent answers and also picks the completion for each answer.
    """
    if not completions:
        return []
    rng = rng_of(seed, "candidates", round_number, completions[0]["question_id"])
    distinct: dict[tuple[bool, str], Completion] = {}
    for one in rng.sample(completions, len(completions)):
        if text := one["text"].strip():
            answer = one["answer"]
            distinct.setdefault((answer is None, answer or text), one)
    return list(distinct.values())[:most]


def translate_candidates(
    drawn: Mapping[str, Sequence[Completion]], questions: Mapping[str, ByLanguage], translator: Translator
) -> dict[str, list[Translated]]:
    """Translates each question's candidates into all its languages.

    Drops a candidate if a translation failed, or if it duplicates an earlier candidate in any language.
    """
    missing = [
        (key, number, code)
        for key, own in drawn.items()
        for number, one in enumerate(own)
        for code in questions[key]
        if code != one["language"]
    ]
    passages = []
    for key, number, code in missing:
        one = drawn[key][number]
        passages.append(Passage(one["text"], one["language"], code, one["answer"], letters(questions[key][code])))
    texts: dict[tuple[str, int, str], str | None] = dict(zip(missing, translator.translate(passages), strict=True))
    return {
        key: _distinct(
            [
                ({code: texts.get((key, number, code), one["text"]) for code in questions[key]}, one)
                for number, one in enumerate(own)
            ]
        )
        for key, own in drawn.items()
    }


def _distinct(candidates: Sequence[tuple[dict[str, str | None], Completion]]) -> list[Translated]:
    """Keeps one question's candidates that exist in every language and duplicate no earlier one in any."""
    kept: list[Translated] = []
    for texts, original in candidates:
        complete = {code: text for code, text in texts.items() if text is not None}
        duplicate = any(other.texts[code].strip() == text.strip() for other in kept for code, text in complete.items())
        if len(complete) == len(texts) and not duplicate:
            kept.append(Translated(complete, original))
    return kept


def candidate_sets(
    questions: ByLanguage,
    translated: Sequence[Translated],
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: PromptForm,
    context_tokens: int | None,
) -> list[CandidateSet]:
    """Returns a question's candidates in each language, or nothing if fewer than two remain.

    Drops a candidate from all languages if, in any of them, it has no tokens or fills the engines' context together
    with its prompt.
    """
    messages = {code: prompt_text(question, form) for code, question in questions.items()}
    prompts = {code: encode_prompt(tokenizer, message) for code, message in messages.items()}
    tokens = [{code: one.tokens(code, tokenizer) for code in questions} for one in translated]

    def fits(sides: Mapping[str, list[int]]) -> bool:
        lengths = [len(prompts[code]) + len(side) for code, side in sides.items()]
        return all(sides.values()) and (context_tokens is None or max(lengths) < context_tokens)

    kept = [(one, sides) for one, sides in zip(translated, tokens, strict=True) if fits(sides)]
    if len(kept) < 2:
        return []
    return [
        CandidateSet(
            question_id=question["question_id"],
            language=code,
            subject=question["subject"],
            prompt=plain_prompt(tokenizer, messages[code]),
            prompt_token_ids=prompts[code],
            choices=[one.texts[code] for one, _ in kept],
            texts=[one.texts[code] for one, _ in kept],
            token_ids=[sides[code] for _, sides in kept],
            right=_right(question, [one for one, _ in kept]),
        )
        for code, question in questions.items()
    ]


def _right(question: Question, translated: Sequence[Translated]) -> int | None:
    """Index of the first candidate with the right answer; None if there is none or the gold answer is unknown."""
    answers = [one.original["answer"] for one in translated]
    gold = question["gold"]
    return answers.index(gold) if gold is not None and gold in answers else None
