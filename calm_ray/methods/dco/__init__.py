"""DCO (Optimizing Language Models for Crosslingual Knowledge Consistency): candidate answers are scored in every
language, and each language learns to weigh them as all languages together do.

With `candidates.form: samples`, which the paper does not have, the candidates are what the policy itself answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import Evaluation, Method, Step
from calm_ray.methods.dco.settings import Dco

if TYPE_CHECKING:
    from calm_ray.training.objectives import Objective


class DcoMethod(Method[Dco]):
    section = "dco"
    settings = Dco
    train_defaults: ClassVar[Mapping[str, Any]] = {  # Appendix G, with the schedule of the released code
        "learning_rate": 1e-5, "warmup_share": 0.0, "schedule": "linear", "epochs": 1, "beta": 1.0,
        "validation_share": 0.0, "reference": "previous",
    }  # fmt: skip

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(recipe), "candidates": {}}

    def check(self, run: RunSettings, own: Dco) -> None:
        if len(run.languages) < 2:
            raise ValueError("languages: DCO compares languages and needs two or more")
        if run.rounds == 0 and run.draws_candidates:
            raise ValueError("rounds: must be 1 or more, since candidates.form: samples has none before round 1")
        if run.train.sft_weight:
            raise ValueError("train.sft_weight: with DCO neither candidate of a pair is the better one; leave it out")
        if own.anchor and own.anchor.language not in run.languages:
            raise ValueError(f"dco.anchor.language: {own.anchor.language} is not one of the run's languages")
        for pair in own.gamma if isinstance(own.gamma, dict) else ():
            first, _, second = pair.partition("-")
            if first == second or not {first, second} <= set(run.languages):
                raise ValueError(f"dco.gamma: {pair} does not name two of the run's languages, like en-fr")

    def needs_gold(self, own: Dco) -> bool:
        return own.exclude_gold

    def steps(self, run: RunSettings, own: Dco) -> tuple[Step, ...]:
        from calm_ray.methods.dco.draw_candidates import DrawCandidates
        from calm_ray.methods.dco.pair_candidates import PairCandidates
        from calm_ray.methods.shared.sample import Sample
        from calm_ray.methods.shared.scores import ReferenceScores

        scores = ReferenceScores(run)
        first = (Sample(run), DrawCandidates(run)) if run.draws_candidates else ()
        return *first, scores, PairCandidates(run, scores, own)

    def objective(self, run: RunSettings, own: Dco) -> Objective:
        from calm_ray.methods.dco.objective import DCO

        return DCO(run.train.beta, own.loss)

    def evaluation(self, run: RunSettings, own: Dco) -> Evaluation:
        """With the optimal policy, where there is one: of two languages drawn out of more, each two have their own."""
        from calm_ray.methods.dco.optimum import optimum_steps
        from calm_ray.methods.shared.evaluation import evaluation_steps

        has_optimum = own.languages == "joint" or len(run.languages) == 2
        answers, *steps = evaluation_steps(run)
        more = [*steps, *(optimum_steps(run, own) if has_optimum else ())]
        return answers, *more

    def remark(self, run: RunSettings, own: Dco) -> str:
        from calm_ray.methods.dco.gamma import check_gamma

        return check_gamma(own, run.languages, run.train.beta)


DCO = DcoMethod()
