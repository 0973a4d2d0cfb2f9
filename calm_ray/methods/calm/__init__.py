"""CALM (Wang, Fan, Wang, Fung and Ji: CALM: Unleashing the Cross-Lingual Self-Aligning Ability of Language Model
Question Answering): completions in all languages vote, and the model learns to prefer winning answers to losing ones.

The SFT baseline trains on the chosen side of the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from calm_ray.core.sections import WORLD
from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import Evaluation, Method, Step
from calm_ray.methods.calm.settings import OPTION_TEXT, Preferences

if TYPE_CHECKING:
    from calm_ray.training.objectives import Objective

EXTRACTION = "preferences.extraction"


class Calm(Method[Preferences]):
    section = "preferences"
    settings = Preferences
    train_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-6, "warmup_ratio": 0.1}  # Table 5

    def check(self, run: RunSettings, own: Preferences) -> None:
        super().check(run, own)
        check_preferences(run, own, needs_gold=self.needs_gold(own))

    def steps(self, run: RunSettings, own: Preferences) -> tuple[Step, ...]:
        from calm_ray.methods.calm.vote_and_pair import VoteAndPair
        from calm_ray.methods.shared.sample import Sample

        return Sample(run, own.extraction, EXTRACTION), VoteAndPair(run, own)

    def objective(self, run: RunSettings, own: Preferences) -> Objective:
        from calm_ray.training.objectives import DPO

        return DPO(run.train.beta, run.train.sft_weight)

    def evaluation(self, run: RunSettings, own: Preferences) -> Evaluation:
        from calm_ray.methods.shared.evaluation import evaluation_steps

        return evaluation_steps(run, own.extraction, EXTRACTION)


class Sft(Calm):
    """The paper's baseline: supervised fine-tuning on the chosen side."""

    train_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-5, "warmup_ratio": 0.0}  # Table 5

    def objective(self, run: RunSettings, own: Preferences) -> Objective:
        from calm_ray.training.objectives import SFT

        return SFT(run.train.sft_mean)


def check_preferences(run: RunSettings, own: Preferences, *, needs_gold: bool) -> None:
    """Raises ValueError if the section `preferences` is incompatible with the run."""
    if (own.winner == "gold") != needs_gold:
        raise ValueError("preferences.winner: must be gold with method: dpo_gold or sft_gold, and only with these")
    if own.translator == WORLD and run.model != WORLD:
        raise ValueError("preferences.translator: only the demo world can use world; set it to model")
    if run.sampling.prompt == "question" and own.extraction != OPTION_TEXT:
        raise ValueError(
            f"sampling.prompt: question does not show the letters; set preferences.extraction to {OPTION_TEXT}, or "
            "sampling.prompt to explain"
        )


CALM = Calm()
SFT = Sft()
