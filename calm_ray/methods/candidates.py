"""The candidate form selected by a recipe."""

from __future__ import annotations

from functools import partial

from calm_ray.core.sections import WORLD, Candidates
from calm_ray.demo.candidates import written_candidates
from calm_ray.prompts.candidates import FORMS, CandidateForm


def candidate_form(settings: Candidates, world_seed: int) -> CandidateForm | None:
    """How to write a question's candidates; None if they are drawn from samples (candidate sets)."""
    if settings.form == "samples":
        return None
    write = partial(written_candidates, world_seed) if settings.form == WORLD else FORMS[settings.form]
    return CandidateForm(write, settings.chat)
