"""Typed requests that steps send to engine actors, and their results.

A `ChunkRequest` turns one language of one chunk of questions into rows that are written into the run; a `Write` returns
replies to messages to its caller. Both are pure: they use a `Generator` and know nothing of Ray or vLLM. Methods may
define more `ChunkRequest`s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from calm_ray.core.rows import CandidateSet, Completion, Prediction, Question, Scored
from calm_ray.core.sections import PromptForm
from calm_ray.core.seeds import derive_seed
from calm_ray.engines.generator import Decoding, Generated, Generator
from calm_ray.prompts.candidates import CandidateForm
from calm_ray.prompts.extraction import read_answers
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt

InRow = TypeVar("InRow")
OutRow = TypeVar("OutRow")
Counts = dict[str, int]
"""Counts over the rows of a chunk, kept in its manifest entry."""


@dataclass(frozen=True)
class Served(Generic[OutRow]):
    """What a request produced for one language of a chunk."""

    kind: type[OutRow]
    """Type of the rows: from `calm_ray.core.rows`, or another one with `question_id`, `language` and `policy`."""
    rows: Sequence[OutRow]
    counts: Counts = field(default_factory=dict)


class ChunkRequest(ABC, Generic[InRow, OutRow]):
    """A request that runs on every chunk in every language. Picklable."""

    @abstractmethod
    def serve(self, generator: Generator, rows: Sequence[InRow], skipped: Sequence[InRow] = ()) -> Served[OutRow]:
        """Serves one language of a chunk; `skipped` are its rows that crash every engine and must not be prompted."""


@dataclass(frozen=True)
class Sample(ChunkRequest[Question, Completion]):
    """Samples `decoding.samples` completions of each question."""

    decoding: Decoding
    seed: int
    """Each question's seed is a hash of (seed, round, question, language), so any engine may serve it."""
    round_number: int
    prompt: PromptForm = "explain"
    extraction: str = "strict"
    """How answers are extracted (`calm_ray.prompts.extraction.EXTRACTORS`)."""

    def serve(
        self, generator: Generator, rows: Sequence[Question], skipped: Sequence[Question] = ()
    ) -> Served[Completion]:
        prompts = [encode_prompt(generator.tokenizer, prompt_text(row, self.prompt)) for row in rows]
        seeds = [derive_seed(self.seed, self.round_number, row["question_id"], row["language"]) for row in rows]
        completions: list[Completion] = []
        for question, prompt, generated in zip(
            rows, prompts, generator.generate(prompts, self.decoding, seeds), strict=True
        ):
            texts = [one.text for one in generated]
            answers = read_answers(self.extraction, texts, question["language"], question["choices"])
            for number, (completion, answer) in enumerate(zip(generated, answers, strict=True)):
                completions.append(self._row(question, prompt, completion, answer, number, generator.policy))
        tokens = sum(len(row["token_ids"]) for row in completions)
        return Served(Completion, completions, {"tokens": tokens, "unparseable": _unparseable(completions)})

    def _row(
        self, question: Question, prompt: list[int], completion: Generated, answer: str | None, number: int, policy: str
    ) -> Completion:
        return Completion(
            question_id=question["question_id"],
            language=question["language"],
            sample=number,
            round=self.round_number,
            text=completion.text,
            prompt_token_ids=prompt,
            token_ids=completion.token_ids,
            logp=completion.logp,
            answer=answer,
            policy=policy,
            finish_reason=completion.finish_reason,
        )


@dataclass(frozen=True)
class Answer(ChunkRequest[Question, Prediction]):
    """Answers each question greedily."""

    max_new_tokens: int
    prompt: PromptForm = "explain"
    extraction: str = "strict"

    def serve(
        self, generator: Generator, rows: Sequence[Question], skipped: Sequence[Question] = ()
    ) -> Served[Prediction]:
        sample = Sample(_greedy(self.max_new_tokens), 0, 0, self.prompt, self.extraction)
        predictions = [
            Prediction(
                question_id=row["question_id"],
                language=row["language"],
                answer=row["answer"],
                text=row["text"],
                policy=row["policy"],
            )
            for row in sample.serve(generator, rows).rows
        ]
        predictions += [_unanswered(question, generator.policy) for question in skipped]
        return Served(Prediction, predictions, {"unparseable": _unparseable(predictions)})


@dataclass(frozen=True)
class Score(ChunkRequest[Any, Scored]):
    """Scores each candidate of each question under the policy."""

    form: CandidateForm | None
    """Builds the candidates of a question; None if the rows already are candidate sets."""
    with_prompt: bool = False
    """Whether to score the prompt's own tokens too."""

    def serve(self, generator: Generator, rows: Sequence[Any], skipped: Sequence[Any] = ()) -> Served[Scored]:
        sets: Sequence[CandidateSet] = rows
        if self.form is not None:
            sets = [self.form.of(question, generator.tokenizer) for question in rows]
        likelihoods = generator.score(
            [row["prompt_token_ids"] for row in sets], [row["token_ids"] for row in sets], with_prompt=self.with_prompt
        )
        scored = [
            Scored(**row, logps=each.logps, prompt_logp=each.prompt_logp, policy=generator.policy)
            for row, each in zip(sets, likelihoods, strict=True)
        ]
        return Served(Scored, scored)


@dataclass(frozen=True)
class Write:
    """Replies greedily to each message, for translators; empty if the message exceeds the context."""

    messages: tuple[str, ...]
    max_new_tokens: int

    def serve(self, generator: Generator) -> list[str]:
        prompts = [encode_prompt(generator.tokenizer, message) for message in self.messages]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < generator.context_tokens]
        generated = generator.generate([prompts[i] for i in fitting], _greedy(self.max_new_tokens), [0] * len(fitting))
        replies = [""] * len(self.messages)
        for i, (completion,) in zip(fitting, generated, strict=True):
            replies[i] = completion.text
        return replies


def _greedy(max_new_tokens: int) -> Decoding:
    return Decoding(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)


def _unparseable(rows: Sequence[Completion] | Sequence[Prediction]) -> int:
    return sum(row["answer"] is None for row in rows)


def _unanswered(question: Question, policy: str) -> Prediction:
    """Placeholder prediction for a bad prompt."""
    return Prediction(
        question_id=question["question_id"], language=question["language"], answer=None, text="", policy=policy
    )
