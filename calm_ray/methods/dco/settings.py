"""The `dco` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from calm_ray.core.sections import Positive, Section

AUTO = "auto"
"""Chosen by the languages' agreement on the questions to train on."""


class Anchor(Section):
    """A language that changes less than the others (DCO, section 6.4)."""

    language: str
    """One of the run's `languages`, or `auto` for the one that agrees most with the others on the questions to train
    on."""
    strength: Positive
    """s: gamma is `train.beta` * s for languages following the anchor, `train.beta` / s for the anchor following them.
    Above 1 the anchor is stable; below 1 it adapts to the others."""


class Dco(Section):
    """Direct consistency optimization: how strongly each language follows the others (DCO, section 4)."""

    gamma: Positive | dict[str, Positive] | None = None
    """gamma_ij of Eq. 11 and 15, how strongly language i follows j: one number for all pairs, or a table such as
    {en-fr: 0.1, fr-en: 10}, where "en-fr" is how strongly en follows fr. Missing entries default to `train.beta`; null
    uses it for all pairs, which makes the optimal policy consistent."""
    anchor: Anchor | None = None
    """Derives gamma from one anchor language. Set only one of this, `gamma` and `weights`."""
    weights: Literal["equal", "auto"] | dict[str, Positive] | None = None
    """Instead of gamma, fit every language to the same weighted mean of all languages' scores: `equal` weights, one per
    language such as {en: 4, fr: 1}, or `auto`, the square of how far above one half a language's agreement with the
    others lies. Unlike gamma, weights add up to 1, so that targets do not grow with the number of languages."""
    fit: Literal["pairs", "options"] = "pairs"
    """What training fits: margins of drawn pairs of candidates (`pairs`, Eq. 11 and 15), or the optimal policy's
    distribution over all candidates of a question at once (`options`, not in the paper). Both have the same optimum."""
    target: Literal["optimal", "random", "gold"] = "optimal"
    """With `fit: options`, the distribution to fit: the `optimal` policy's; a control that gives its probabilities to
    randomly permuted candidates, the same ones in all languages (`random`); or all probability on the right candidate
    (`gold`, required by `method: dco_gold` and invalid with any other)."""
    languages: Literal["joint", "bilingual"] = "joint"
    """Compare each pair of candidates in all languages (`joint`, Eq. 15) or in two drawn by the seed (`bilingual`, the
    released code)."""
    exclude_gold: bool = False
    """Draw pairs of wrong candidates only. Requires gold answers, which then affect what is trained on."""
    loss: Literal["absolute", "huber", "squared"] = "absolute"
    """Loss on the difference between beta * margin and its target; the paper uses `absolute`. `huber` is quadratic
    within 1 nat."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Dco:
        given = [name for name in ("gamma", "anchor", "weights") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: cannot be combined with {given[0]}; set only one of them")
        if self.languages == "bilingual":
            if self.weights is not None:
                raise ValueError("weights: requires languages: joint")
            if self.fit == "options":
                raise ValueError("fit: options requires languages: joint")
        if self.fit == "options" and self.exclude_gold:
            raise ValueError("exclude_gold: requires fit: pairs")
        if self.fit == "pairs" and self.target != "optimal":
            raise ValueError(f"target: {self.target} requires fit: options")
        return self
