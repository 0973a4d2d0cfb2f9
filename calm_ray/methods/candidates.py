"""The candidates that a recipe asks for."""

from __future__ import annotations

from functools import partial

from calm_ray.core.sections import WORLD, Candidates
from calm_ray.demo.candidates import written_out
from calm_ray.prompts.candidates import FORMS, CandidateForm


def candidate_form(settings: Candidates, world_seed: int) -> CandidateForm | None:
    """How a question's candidates are made; None where they are drawn from samples, and come as candidate sets."""
    if settings.form == "samples":
        return None
    write = partial(written_out, world_seed) if settings.form == WORLD else FORMS[settings.form]
    return CandidateForm(write, settings.chat)
