"""Draws candidates from the policy's own samples and translates them into every language, one task per chunk."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.rows import CandidateSet, Completion, Question, rows_of, table
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import ChunkJob, DataStep, Entry
from calm_ray.methods.dco.sampled_candidates import candidate_sets, draw, translate_candidates
from calm_ray.methods.round import Round
from calm_ray.methods.shared.sample import completions_of
from calm_ray.methods.translation import load_tokenizer, make_translator
from calm_ray.methods.work import BYTES_PER_TOKEN, Sizes, Work
from calm_ray.run.model_files import context_tokens
from calm_ray.run.policies import RunModel
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines.text_service import TextService


@dataclass(frozen=True)
class DrawCandidates(DataStep):
    """Draws up to `candidates.max_candidates` distinct answers per question, translated into all languages."""

    settings: RunSettings

    name = "candidates"
    reads = ("questions", "sample")
    keys = ("candidates.max_candidates", "candidates.translator")

    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        round.engines.refresh(round.start)  # the policy that sampled may also have to translate
        folder = round.model.local_folder(weights=False)
        limit = context_tokens(folder, self.settings.engines.args)
        text_service = round.engines.text_service
        questions, completions = inputs
        return DrawJob(questions, completions, output, self.settings, round.model, round.number, text_service, limit)

    def note(self, made: Counter[str]) -> str:
        return f"{made['candidates']} candidates for {made['questions']} questions"

    def record(self, counts: Counter[str]) -> Entry:
        return dict(counts)

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """An upper bound: assumes that every candidate is translated into all other languages."""
        candidates = self.settings.candidates
        assert candidates is not None
        rows = sizes.questions * candidates.max_candidates
        translates = candidates.translator == "model"
        return Work(
            rows=rows,
            unit="candidates",
            written=rows * (sizes.languages - 1) * sizes.reply if translates else 0,
            disk=rows * sizes.languages * (sizes.prompt + sizes.reply) * BYTES_PER_TOKEN,
        )


@dataclass(frozen=True)
class DrawJob(ChunkJob):
    """Everything a task needs to turn a chunk of completions into candidate sets."""

    questions: Stage
    completions: Stage
    output: Stage
    settings: RunSettings
    model: RunModel
    round_number: int
    text_service: TextService
    context_tokens: int | None
    """The engines' limit on prompt plus candidate, in tokens; None if unknown."""

    def make(self, chunk: str) -> Counter[str]:
        settings, candidates = self.settings, self.settings.candidates
        assert candidates is not None
        questions = {
            key: {code: by_language[code] for code in settings.languages}
            for key, by_language in self._questions(chunk).items()
            if by_language.keys() >= set(settings.languages)
        }
        completions = self._completions(chunk)
        drawn = {
            key: draw(completions[key], candidates.max_candidates, settings.seed, self.round_number)
            for key in questions
        }
        translator = make_translator(candidates.translator, settings, self.text_service)
        tokenizer = load_tokenizer(self.model)
        sets = [
            found
            for key, translated in translate_candidates(drawn, questions, translator).items()
            for found in candidate_sets(
                questions[key],
                translated,
                tokenizer,
                form=settings.sampling.prompt,
                context_tokens=self.context_tokens,
            )
        ]
        self.output.write(chunk, table(CandidateSet, sets))
        return self._count(sets)

    def count(self, chunk: str) -> Counter[str]:
        """Counts the chunk's questions that have candidates, and their candidates."""
        return self._count(rows_of(self.output.read_chunk(chunk)))

    def _count(self, sets: Sequence[CandidateSet]) -> Counter[str]:
        rows = [row for row in sets if row["language"] == self.settings.languages[0]]  # other languages are parallel
        return Counter(questions=len(rows), candidates=sum(len(row["texts"]) for row in rows))

    def _questions(self, chunk: str) -> dict[str, dict[str, Question]]:
        found: dict[str, dict[str, Question]] = defaultdict(dict)
        for question in rows_of(self.questions.read_chunk(chunk)):
            found[question["question_id"]][question["language"]] = question
        return found

    def _completions(self, chunk: str) -> dict[str, list[Completion]]:
        """Returns each question's completions in all languages."""
        found: dict[str, list[Completion]] = defaultdict(list)
        for row in completions_of(self.completions, chunk, self.settings.languages):
            found[row["question_id"]].append(row)
        return found
