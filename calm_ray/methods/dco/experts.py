"""The optimal policy as a product of experts: every language's scores, calibrated or not, with an exponent each.

Pure: L languages, Q questions, at most K candidates, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from calm_ray.core.seeds import rng_of
from calm_ray.evaluation.scores import Scores, Tables, columns_of_convention
from calm_ray.methods.dco.calibration import COLUMNS, Means, calibrated
from calm_ray.methods.dco.gamma import Floats, optimal_logps
from calm_ray.methods.dco.pairs import DrawnPairs, reference_margins, targets


@dataclass(frozen=True)
class Experts:
    """What the optimal policy of a round multiplies. Picklable."""

    gamma: Floats
    """[L, L], see `calm_ray.methods.dco.gamma.gammas`."""
    beta: float
    means: Means | None = None
    """With `candidates.calibrate`, what is subtracted from each candidate's log-probability."""
    target: Literal["optimal", "random", "gold"] = "optimal"
    """Whether to replace the optimal policy: `dco.target`."""
    seed: int = 0
    """Of the permutations of `random`."""

    @property
    def columns(self) -> list[str]:
        """The columns of `Scored` that it needs."""
        return columns_of_convention("sum") if self.means is None else COLUMNS

    def of(self, scores: Scores, scored: Tables) -> Scores:
        """The experts' log-probabilities; `scored` has the rows that `scores` were read from."""
        return scores if self.means is None else calibrated(scores, scored, self.means)

    def optimal(self, scores: Scores, scored: Tables) -> Floats:
        """Returns the optimal policy's log-probabilities [L, Q, K], up to a constant per question (Eq. 10 and 16).

        With another `target`, returns that instead.
        """
        if self.target == "gold":
            is_right = np.arange(scores.logps.shape[2]) == scores.right[:, None]
            return np.tile(np.where(is_right, 0.0, -np.inf), (len(scores.languages), 1, 1))
        optimal = optimal_logps(self.of(scores, scored).logps, self.gamma, self.beta)
        if self.target == "random":
            for number, (question_id, count) in enumerate(zip(scores.questions, scores.counts, strict=True)):
                order = rng_of(self.seed, "target", question_id).sample(range(count), int(count))
                optimal[:, number, :count] = optimal[:, number, order]
        return optimal

    def targets(self, scores: Scores, scored: Tables, drawn: DrawnPairs) -> Floats:
        """Returns targets [P, L] for beta times each pair's margin: beta times that of the optimal policy less that of
        the reference, which without calibration is Eq. 15."""
        experts = self.of(scores, scored)
        found = targets(experts, drawn, self.gamma)
        if experts is not scores:
            found += self.beta * (reference_margins(experts, drawn) - reference_margins(scores, drawn))
        return found
