"""PREFER with `dco.fit: options`: the optimal policy's distribution over every question's candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from calm_ray.core.console import console
from calm_ray.core.rows import OptionTargets, schema
from calm_ray.core.settings import RunSettings
from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.scores import read_scored, scores_of
from calm_ray.methods.base import ChunkJob, Column, DataStep, Entry
from calm_ray.methods.dco.audit_target import KEYS, AuditTarget, experts_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.round import QuestionView, Round
from calm_ray.methods.shared.scores import ReferenceScores, candidate_count, candidate_tokens
from calm_ray.methods.work import BYTES_PER_TOKEN, Sizes, Work
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class FitOptions(DataStep):
    """Writes one row per question and language, with all candidates and their probabilities."""

    settings: RunSettings
    scores: ReferenceScores

    name = "option_targets"
    columns: ClassVar[tuple[Column, ...]] = (Column("options", lambda entry: str(entry.get("options", 0))),)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.scores.reads, self.scores.name, AuditTarget.name)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*KEYS, "dco.fit", "train.reference")

    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        return OptionJob(inputs[1], output, self.settings.languages, experts_of(inputs[2], self.settings))

    def note(self, made: Counter[str]) -> str:
        return f"{made['options']} rows"

    def record(self, counts: Counter[str]) -> Entry:
        return {"options": counts["options"]}

    def summary(self, record: Entry) -> Entry:
        return {"options": record["options"]}

    def empty_reason(self, record: Entry) -> str:
        return "no question has candidates in every language"

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        candidates = self.scores.candidates
        rows, side = sizes.questions * sizes.languages, candidate_tokens(candidates, sizes)
        branches = candidate_count(candidates, sizes)
        disk = rows * (sizes.prompt + branches * side) * BYTES_PER_TOKEN
        return Work(rows=rows, unit="questions", side=side, branches=branches, disk=disk)

    def show(self, view: QuestionView) -> None:
        for row in view.rows(self.name)[:1]:
            options = zip(row["texts"], row["probabilities"], strict=True)
            shown = ", ".join(f"{text.strip()} {probability:.0%}" for text, probability in options)
            console.print(f"target in {row['language']}: {shown}", markup=False)


@dataclass(frozen=True)
class OptionJob(ChunkJob):
    """Everything a task needs to compute a chunk's distributions."""

    scored: Stage
    """Scores under the reference."""
    options: Stage
    languages: list[str]
    experts: Experts

    def make(self, chunk: str) -> Counter[str]:
        scored = read_scored(self.scored, chunk, self.languages)
        scores = scores_of(scored)
        fitted = probabilities(self.experts.optimal(scores, scored))
        tables = []
        for i, language in enumerate(self.languages):
            rows = scored[language].take(pa.array(scores.places[i]))
            tables.append(_rows(rows, [row[:n].tolist() for row, n in zip(fitted[i], scores.counts, strict=True)]))
        found = pa.concat_tables(tables)
        self.options.write(chunk, found)
        return Counter(options=len(found))

    def count(self, chunk: str) -> Counter[str]:
        return Counter(options=len(self.options.read_chunk(chunk, ["number"])))


def _rows(scored: pa.Table, fitted: list[list[float]]) -> pa.Table:
    own = scored.append_column("number", pa.repeat(pa.scalar(0, pa.int64()), len(scored)))
    own = own.append_column("probabilities", pa.array(fitted, pa.list_(pa.float64())))
    fields = schema(OptionTargets)
    return own.select(fields.names).cast(fields)
