"""The gold baselines, the only methods that train with gold answers: DPO and SFT on correct pairs, DCO on correct
distributions.

Pairs come from votes whose winner is correct (CALM, Table 2) or, with `candidates`, set the correct candidate against
another one (DCO, section 6.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import Step
from calm_ray.methods.calm import Calm, Sft
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.dco import DcoMethod


class DpoGold(Calm):
    def needs_gold(self, own: Preferences) -> bool:
        return True

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(recipe), self.section: {"winner": "gold"}}

    def steps(self, run: RunSettings, own: Preferences) -> tuple[Step, ...]:
        if run.candidates is None:
            return super().steps(run, own)
        from calm_ray.methods.dco.pair_candidates import PairCandidates
        from calm_ray.methods.shared.scores import ReferenceScores

        scores = ReferenceScores(run)
        return scores, PairCandidates(run, scores)


class SftGold(DpoGold, Sft):
    """Supervised fine-tuning on the correct side."""


class DcoGold(DcoMethod):
    """What `dco.fit: options` reaches at best, with all probability on the correct candidate."""

    is_gold = True

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(recipe), self.section: {"fit": "options", "target": "gold"}}


DPO_GOLD = DpoGold()
SFT_GOLD = SftGold()
DCO_GOLD = DcoGold()
