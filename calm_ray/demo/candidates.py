"""The demo world's answers as candidates: the statement that would make a choice right, and its letter."""

from __future__ import annotations

from functools import cache

from calm_ray.core.rows import Question
from calm_ray.demo.generator import World, build_world
from calm_ray.prompts.candidates import Asked
from calm_ray.prompts.questions import prompt_text


def written_out(seed: int, question: Question) -> Asked:
    """The answers of the world with this seed, written out."""
    texts = _world(seed).answers(question)
    return Asked(prompt_text(question, instruction=False), texts, texts)


@cache
def _world(seed: int) -> World:
    return build_world(seed)
