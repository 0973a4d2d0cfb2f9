"""DCO (Optimizing Language Models for Crosslingual Knowledge Consistency).

Scores candidate answers in every language and trains each language toward the preferences of all languages combined.
`candidates.form: samples` (not in the paper) uses the policy's own answers as candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from calm_ray.core.settings import RunSettings
from calm_ray.methods.base import Evaluation, Method, Step
from calm_ray.methods.dco.settings import AUTO, Dco

if TYPE_CHECKING:
    from calm_ray.training.objectives import Objective


class DcoMethod(Method[Dco]):
    section = "dco"
    settings = Dco
    is_gold: ClassVar[bool] = False
    """Whether gold answers are the target."""
    train_defaults: ClassVar[Mapping[str, Any]] = {  # Appendix G; schedule from the released code
        "learning_rate": 1e-5, "warmup_ratio": 0.0, "schedule": "linear", "epochs": 1, "beta": 1.0,
        "validation_fraction": 0.0, "reference": "previous",
    }  # fmt: skip

    def defaults(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults(recipe), "candidates": {}}

    def check(self, run: RunSettings, own: Dco) -> None:
        if len(run.languages) < 2:
            raise ValueError("languages: DCO needs at least two languages")
        if (own.target == "gold") != self.is_gold:
            raise ValueError("dco.target: must be gold with method: dco_gold, and only with it")
        if run.rounds == 0 and run.samples_candidates:
            raise ValueError(
                "rounds: must be at least 1, since candidates.form: samples has no candidates before round 1"
            )
        if run.train.sft_weight:
            raise ValueError("train.sft_weight: must be 0 with DCO, where neither candidate of a pair is preferred")
        if own.anchor and own.anchor.language not in (AUTO, *run.languages):
            raise ValueError(f"dco.anchor.language: {own.anchor.language} is not one of the run's languages")
        for pair in own.gamma if isinstance(own.gamma, dict) else ():
            first, _, second = pair.partition("-")
            if first == second or not {first, second} <= set(run.languages):
                raise ValueError(f"dco.gamma: {pair} does not name two of the run's languages (example: en-fr)")

        if isinstance(own.weights, dict) and own.weights.keys() != set(run.languages):
            raise ValueError(f"dco.weights: must have exactly the run's languages: {', '.join(run.languages)}")
        if run.candidates and run.candidates.calibrate and run.samples_candidates:
            raise ValueError("candidates.calibrate: sampled candidates do not recur; use another candidates.form")

    def needs_gold(self, own: Dco) -> bool:
        return self.is_gold or own.exclude_gold

    def steps(self, run: RunSettings, own: Dco) -> tuple[Step, ...]:
        from calm_ray.methods.dco.audit_target import AuditTarget
        from calm_ray.methods.dco.draw_candidates import DrawCandidates
        from calm_ray.methods.dco.fit_options import FitOptions
        from calm_ray.methods.dco.pair_candidates import PairCandidates
        from calm_ray.methods.shared.sample import Sample
        from calm_ray.methods.shared.scores import ReferenceScores

        scores = ReferenceScores(run)
        first = (Sample(run), DrawCandidates(run)) if run.samples_candidates else ()
        examples = FitOptions(run, scores) if own.fit == "options" else PairCandidates(run, scores, own)
        return *first, scores, AuditTarget(run, scores, own), examples

    def objective(self, run: RunSettings, own: Dco) -> Objective:
        from calm_ray.methods.dco.objective import DCO, DCOOptions

        return DCOOptions() if own.fit == "options" else DCO(run.train.beta, own.loss)

    def evaluation(self, run: RunSettings, own: Dco) -> Evaluation:
        """Adds the optimal policy if there is one: bilingual pairs of three or more languages do not share one."""
        from calm_ray.methods.dco.optimum import optimum_steps
        from calm_ray.methods.shared.evaluation import evaluation_steps

        has_optimum = own.target == "optimal" and (own.languages == "joint" or len(run.languages) == 2)
        answers, *steps = evaluation_steps(run)
        more = [*steps, *(optimum_steps(run, own) if has_optimum else ())]
        return answers, *more

    def notice(self, run: RunSettings, own: Dco) -> str:
        from calm_ray.methods.dco.gamma import check_gamma

        return check_gamma(own, run.languages, run.train.beta)


DCO = DcoMethod()
