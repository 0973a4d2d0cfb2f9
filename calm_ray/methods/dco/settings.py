"""The section `dco` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from calm_ray.core.sections import Positive, Section


class Anchor(Section):
    """A language that moves less than the others, and by how much (DCO, section 6.4)."""

    language: str
    strength: Positive
    """s: the others follow the anchor's margins s times, it follows theirs 1/s times. Above 1 the anchor is stable."""


class Dco(Section):
    """Direct consistency optimisation: how far each language follows the others (DCO, section 4)."""

    gamma: Positive | dict[str, Positive] | None = None
    """gamma_ij of Eq. 11 and 15, how far language i follows j: one number for all, or a table like {en-fr: 0.1,
    fr-en: 10}, where "en-fr" is how far en follows fr. Entries left out are `train.beta`; where all are, the optimal
    policy is consistent."""
    anchor: Anchor | None = None
    """Instead of `gamma`."""
    languages: Literal["joint", "bilingual"] = "joint"
    """Every pair of candidates is compared in all languages (Eq. 15), or in two of them, drawn by the seed, as the
    released code has it."""
    exclude_gold: bool = False
    """Draw pairs of wrong candidates alone: gold answers then choose what is trained on."""
    loss: Literal["absolute", "huber", "squared"] = "absolute"
    """Of the difference between a margin and its target; the paper's is absolute."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Dco:
        if self.gamma is not None and self.anchor is not None:
            raise ValueError("anchor: sets every gamma itself; leave out gamma, or anchor")
        return self
