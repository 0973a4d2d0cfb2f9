"""Ray Data from scored candidates to the pairs of DCO and of the gold baselines: one task takes one chunk.

The join over languages is by file: a chunk holds the same questions in every language.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from calm_ray.core.rows import Pair, schema
from calm_ray.core.sections import Dco
from calm_ray.evaluation.scores import columns_for, read_scored, scores_of
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.pairs import draw_pairs, pair_tables, targets
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class CandidatePairs:
    """All that a task needs to draw the pairs of a chunk and join their margins."""

    scored: Stage
    """Under the reference."""
    pairs: Stage
    languages: list[str]
    settings: Dco
    beta: float
    gold: bool
    """The right candidate against another one, with no target: for the gold baselines."""
    seed: int
    round_number: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the pairs of chunk `row["chunk"]`, in all languages; returns how many."""
        chunk = str(row["chunk"])
        scored = read_scored(self.scored, chunk, self.languages)
        scores = scores_of({code: data.select(columns_for("sum")) for code, data in scored.items()})
        drawn = draw_pairs(scores, self.settings, seed=self.seed + self.round_number - 1, gold=self.gold)
        found = schema(Pair).empty_table()
        if len(drawn.question):
            target = None if self.gold else targets(scores, drawn, gammas(self.settings, self.languages, self.beta))
            found = pair_tables(scored, drawn, target, scores, self.round_number)
        self.pairs.write(chunk, found)
        return {"chunk": chunk, "pairs": len(found)}

    def count(self, chunk: str) -> Counter[str]:
        """How many pairs a chunk holds."""
        return Counter(pairs=len(self.pairs.read_chunk(chunk, ["pair"])))
