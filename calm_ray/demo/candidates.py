"""The demo world's answers as candidates: for each choice, the statement that would make it right and its letter."""

from __future__ import annotations

from functools import cache

from calm_ray.core.rows import Question
from calm_ray.demo.generator import World, build_world
from calm_ray.prompts.candidates import Asked
from calm_ray.prompts.questions import prompt_text


def written_candidates(seed: int, question: Question) -> Asked:
    """The full text of each answer in the world with this seed."""
    texts = _world(seed).answers(question)
    return Asked(prompt_text(question, "choices"), texts, texts)


@cache
def _world(seed: int) -> World:
    return build_world(seed)
