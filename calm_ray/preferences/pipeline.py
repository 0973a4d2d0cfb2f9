"""The Ray Data pipeline from completions to votes and pairs: one task takes one chunk of questions in all languages.

A chunk's files hold the same questions in every language, so nothing is shuffled, and no task sees more than a chunk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calm_ray.config import Preferences
from calm_ray.evaluation.report import count_votes, gold_of
from calm_ray.policies import BaseModel
from calm_ray.preferences.pairs import carry_over, draft_pairs, finish_pairs, group_by_question
from calm_ray.preferences.translators import ModelTranslator, Translator
from calm_ray.preferences.voting import vote
from calm_ray.rows import Completion, Pair, Vote, rows_of, table
from calm_ray.rundir import Stage
from calm_ray.world.generator import build_world
from calm_ray.world.translator import WorldTranslator


@dataclass(frozen=True)
class PreferenceJob:
    """All that a task needs to turn one chunk of completions into votes and pairs."""

    questions: Stage
    completions: Stage
    votes: Stage
    pairs: Stage
    languages: list[str]
    preferences: Preferences
    instruction: bool
    model: BaseModel
    seed: int
    round_number: int
    world_seed: int
    engines: list[ActorHandle[Any]]
    max_new_tokens: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the votes and pairs of chunk `row["chunk"]`; returns what became of its drafts."""
        chunk = str(row["chunk"])
        completions = self._read(chunk)
        by_question = group_by_question(completions)
        votes = [vote(rows, self.preferences, self.seed) for rows in by_question.values()]
        drafts = [draft for rows in by_question.values() for draft in draft_pairs(rows, self.preferences, self.seed)]
        questions = {(q["question_id"], q["language"]): q for q in rows_of(self.questions.read_chunk(chunk))}
        tokenizer = load_tokenizer(self.model)
        texts = carry_over(drafts, questions, self._translator())
        pairs = finish_pairs(drafts, texts, questions, tokenizer, self.instruction, self.round_number)
        self.votes.write(chunk, table(Vote, votes))
        self.pairs.write(chunk, table(Pair, pairs))
        return {"chunk": chunk, "questions": len(votes), "drafts": len(drafts), "pairs": len(pairs)}

    def count(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the report of a round counts in chunk `row["chunk"]`."""
        chunk = str(row["chunk"])
        votes, pairs = rows_of(self.votes.read_chunk(chunk)), rows_of(self.pairs.read_chunk(chunk))
        gold = gold_of(rows_of(self.questions.read_chunk(chunk)))
        return {"counts": json.dumps(count_votes(votes, self._read(chunk), pairs, gold))}

    def _read(self, chunk: str) -> list[Completion]:
        files = [self.completions.read_chunk(f"{chunk}-{language}") for language in self.languages]
        return rows_of(pa.concat_tables(files))

    def _translator(self) -> Translator:
        if self.preferences.translator == "world":
            return world_translator(self.world_seed)
        return ModelTranslator(self._write)

    def _write(self, messages: list[str]) -> list[str]:
        # Spread over the engines, which are idle while preferences are made.
        parts = [messages[number :: len(self.engines)] for number in range(len(self.engines))]
        replies = ray.get([e.write.remote(p, self.max_new_tokens) for e, p in zip(self.engines, parts, strict=True)])
        return [replies[i % len(parts)][i // len(parts)] for i in range(len(messages))]


@lru_cache(maxsize=1)
def load_tokenizer(model: BaseModel) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model.local_folder(weights=False), trust_remote_code=False)


@lru_cache(maxsize=1)
def world_translator(seed: int) -> WorldTranslator:
    return WorldTranslator(build_world(seed))


def make_preferences(job: PreferenceJob, chunks: Sequence[str], cpus: float) -> Iterator[dict[str, Any]]:
    """Writes the votes and pairs of these chunks; yields each chunk's counts as it is finished."""
    yield from _over_chunks(job, chunks, cpus)


def count_chunks(job: PreferenceJob, chunks: Sequence[str], cpus: float) -> Counter[str]:
    """The sums of `count_votes` over the chunks. Only here are gold answers read, after the pairs are written."""
    total: Counter[str] = Counter()
    for row in _over_chunks(job.count, chunks, cpus):
        total.update(json.loads(row["counts"]))
    return total


def _over_chunks(
    function: Callable[[dict[str, Any]], dict[str, Any]], chunks: Sequence[str], cpus: float
) -> Iterator[Any]:
    if chunks:
        dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        yield from dataset.map(function, num_cpus=cpus).iter_rows()
