"""From completions to votes and pairs: what a Ray Data task does with one chunk of questions in all languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calm_ray.core.rows import Completion, Pair, Question, Vote, gold_of, rows_of, table
from calm_ray.core.sections import Preferences
from calm_ray.demo.generator import build_world
from calm_ray.demo.translator import WorldTranslator
from calm_ray.engines.text_service import TextService
from calm_ray.methods.calm.pairs import carry_over, draft_pairs, finish_pairs
from calm_ray.methods.calm.vote_report import columns_of_pairs, count_samples
from calm_ray.methods.calm.voting import Ballots, Election, ballots_of, elect, right_answers, vote_rows
from calm_ray.methods.translation import ModelTranslator
from calm_ray.prompts.passages import Translator
from calm_ray.run.policies import RunModel
from calm_ray.run.stage import Stage


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
    model: RunModel
    seed: int
    round_number: int
    world_seed: int
    text_service: TextService
    max_new_tokens: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the votes and pairs of chunk `row["chunk"]`; returns what became of its drafts."""
        chunk = str(row["chunk"])
        completions = self._read(chunk)
        questions = {(q["question_id"], q["language"]): q for q in rows_of(self.questions.read_chunk(chunk))}
        ballots = ballots_of(completions)
        election = self._elect(ballots, questions.values())
        drafts = draft_pairs(completions, ballots, election, self.preferences, self.seed)
        tokenizer = load_tokenizer(self.model)
        texts = carry_over(drafts, questions, self._translator())
        pairs = finish_pairs(drafts, texts, questions, tokenizer, self.instruction, self.round_number)
        self.votes.write(chunk, table(Vote, vote_rows(ballots, election)))
        self.pairs.write(chunk, table(Pair, pairs))
        return {"chunk": chunk, "questions": len(ballots.questions), "drafts": len(drafts), "pairs": len(pairs)}

    def count(self, chunk: str) -> Counter[str]:
        """What the report of a round counts in a chunk; gold answers are read for it after the pairs are written."""
        questions = rows_of(self.questions.read_chunk(chunk))
        ballots = ballots_of(self._read(chunk))
        pairs = columns_of_pairs(rows_of(self.pairs.read_chunk(chunk)), ballots)
        return count_samples(
            ballots,
            self._elect(ballots, questions),
            pairs,
            right_answers(ballots, gold_of(questions)),
            as_released=self.preferences.preset == "released",
        )

    def _elect(self, ballots: Ballots, questions: Iterable[Question]) -> Election:
        is_gold = self.preferences.winner == "gold"
        right = right_answers(ballots, gold_of(questions)) if is_gold else None
        return elect(ballots, self.preferences, self.seed, right)

    def _read(self, chunk: str) -> list[Completion]:
        files = [self.completions.read_chunk(f"{chunk}-{language}") for language in self.languages]
        return rows_of(pa.concat_tables(files))

    def _translator(self) -> Translator:
        return translator_named(self.preferences.translator, self.world_seed, self.text_service, self.max_new_tokens)


@lru_cache(maxsize=1)
def load_tokenizer(model: RunModel) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model.local_folder(weights=False), trust_remote_code=False)


def translator_named(name: str, world_seed: int, text_service: TextService, max_new_tokens: int) -> Translator:
    """The translator that `preferences.translator` names."""
    if name == "world":
        return world_translator(world_seed)
    return ModelTranslator(lambda messages: text_service(messages, max_new_tokens))


@lru_cache(maxsize=1)
def world_translator(seed: int) -> WorldTranslator:
    return WorldTranslator(build_world(seed))
