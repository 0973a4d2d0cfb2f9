"""PREFER: draws pairs of candidates with their target margins, one task per chunk.

Languages are joined by file: a chunk holds the same questions in every language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calm_ray.core.rows import Pair, schema
from calm_ray.core.settings import RunSettings
from calm_ray.evaluation.scores import read_scored, scores_of
from calm_ray.methods.base import ChunkJob, Entry
from calm_ray.methods.dco.audit_target import KEYS, AuditTarget, experts_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.pairs import draw_pairs, pair_tables
from calm_ray.methods.dco.settings import Dco
from calm_ray.methods.round import Round
from calm_ray.methods.shared.pairs import PairStep
from calm_ray.methods.shared.scores import ReferenceScores, candidate_tokens
from calm_ray.methods.work import BYTES_PER_TOKEN, Sizes, Work
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class PairCandidates(PairStep):
    """Draws `candidates.pairs` pairs of candidates per question."""

    settings: RunSettings
    scores: ReferenceScores
    dco: Dco | None = None
    """None for the gold baselines: pairs of the right candidate and another one, without targets."""

    title = "pair candidates"

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.scores.reads, self.scores.name, *((AuditTarget.name,) if self.dco is not None else ()))

    @property
    def keys(self) -> tuple[str, ...]:
        dco = (*KEYS, "dco.exclude_gold", "dco.fit")
        return ("candidates.pairs", "train.reference", *(dco if self.dco is not None else ()))

    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        experts = experts_of(inputs[2], self.settings) if self.dco is not None else None
        return PairJob(inputs[1], output, self.settings, self.dco, experts, round.number)

    def empty_reason(self, record: Entry) -> str:
        return "no pair could be drawn"

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        candidates = self.scores.candidates
        languages = 2 if self.dco is not None and self.dco.languages == "bilingual" else sizes.languages
        pairs, side = sizes.questions * candidates.pairs * languages, candidate_tokens(candidates, sizes)
        disk = pairs * (sizes.prompt + 2 * side) * BYTES_PER_TOKEN
        return Work(rows=pairs, unit="pairs", side=side, disk=disk)


@dataclass(frozen=True)
class PairJob(ChunkJob):
    """Everything a task needs to draw a chunk's pairs and join their margins."""

    scored: Stage
    """Scores under the reference."""
    pairs: Stage
    settings: RunSettings
    dco: Dco | None
    experts: Experts | None
    """None for the gold baselines, which have no targets."""
    round_number: int

    def make(self, chunk: str) -> Counter[str]:
        settings, dco = self.settings, self.dco
        assert settings.candidates is not None
        scored = read_scored(self.scored, chunk, settings.languages)
        scores = scores_of(scored)
        seed = settings.seed + self.round_number - 1
        drawn = draw_pairs(scores, settings.candidates.pairs, dco, seed=seed)
        found = schema(Pair).empty_table()
        if len(drawn.question):
            target = self.experts.targets(scores, scored, drawn) if self.experts is not None else None
            found = pair_tables(scored, drawn, target, scores, self.round_number)
        self.pairs.write(chunk, found)
        return Counter(pairs=len(found))

    def count(self, chunk: str) -> Counter[str]:
        return Counter(pairs=len(self.pairs.read_chunk(chunk, ["pair"])))
