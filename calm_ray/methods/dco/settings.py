"""The `dco` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from calm_ray.core.sections import Positive, Section


class Anchor(Section):
    """A language that changes less than the others (DCO, section 6.4)."""

    language: str
    """One of the run's `languages`."""
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
    """Derives gamma from one anchor language. Set either this or `gamma`."""
    languages: Literal["joint", "bilingual"] = "joint"
    """Compare each pair of candidates in all languages (`joint`, Eq. 15) or in two drawn by the seed (`bilingual`, the
    released code)."""
    exclude_gold: bool = False
    """Draw pairs of wrong candidates only. Requires gold answers, which then affect what is trained on."""
    loss: Literal["absolute", "huber", "squared"] = "absolute"
    """Loss on the difference between beta * margin and its target; the paper uses `absolute`. `huber` is quadratic
    within 1 nat."""

    @model_validator(mode="after")
    def _gamma_or_anchor(self) -> Dco:
        if self.gamma is not None and self.anchor is not None:
            raise ValueError("anchor: cannot be combined with gamma; set only one of them")
        return self
