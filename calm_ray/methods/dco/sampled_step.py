"""Ray Data from a policy's own samples to candidates in every language: one task takes one chunk."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from calm_ray.core.rows import CandidateSet, Completion, Question, rows_of, table
from calm_ray.engines.text_service import TextService
from calm_ray.methods.calm.step import load_tokenizer, translator_named
from calm_ray.methods.dco.sampled_candidates import candidate_sets, carry, draw
from calm_ray.run.policies import RunModel
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class OwnCandidates:
    """All that a task needs to turn a chunk of completions into candidate sets."""

    questions: Stage
    completions: Stage
    output: Stage
    languages: list[str]
    model: RunModel
    translator: str
    instruction: bool
    most: int
    seed: int
    round_number: int
    world_seed: int
    text_service: TextService
    max_new_tokens: int
    context_tokens: int | None
    """The most tokens of a prompt and a candidate that the engines take; None where nothing says it."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the candidate sets of chunk `row["chunk"]`, in all languages; returns how many there are."""
        chunk = str(row["chunk"])
        questions = {
            key: {code: by_language[code] for code in self.languages}
            for key, by_language in self._questions(chunk).items()
            if by_language.keys() >= set(self.languages)
        }
        completions = self._completions(chunk)
        drawn = {key: draw(completions[key], self.most, self.seed, self.round_number) for key in questions}
        translator = translator_named(self.translator, self.world_seed, self.text_service, self.max_new_tokens)
        tokenizer = load_tokenizer(self.model)
        sets = [
            one
            for key, carried in carry(drawn, questions, translator).items()
            for one in candidate_sets(
                questions[key],
                carried,
                tokenizer,
                instruction=self.instruction,
                context_tokens=self.context_tokens,
            )
        ]
        self.output.write(chunk, table(CandidateSet, sets))
        own = [one for one in sets if one["language"] == self.languages[0]]  # the others are parallel
        return {"chunk": chunk, "questions": len(own), "candidates": sum(len(one["texts"]) for one in own)}

    def count(self, chunk: str) -> Counter[str]:
        """The questions of a chunk that have candidates, and their candidates."""
        own = [one for one in rows_of(self.output.read_chunk(chunk)) if one["language"] == self.languages[0]]
        return Counter(questions=len(own), candidates=sum(len(one["texts"]) for one in own))

    def _questions(self, chunk: str) -> dict[str, dict[str, Question]]:
        found: dict[str, dict[str, Question]] = defaultdict(dict)
        for question in rows_of(self.questions.read_chunk(chunk)):
            found[question["question_id"]][question["language"]] = question
        return found

    def _completions(self, chunk: str) -> dict[str, list[Completion]]:
        """The completions of each question, in all languages."""
        found: dict[str, list[Completion]] = defaultdict(list)
        for code in self.languages:
            for one in rows_of(self.completions.read_chunk(f"{chunk}-{code}")):
                found[one["question_id"]].append(one)
        return found
