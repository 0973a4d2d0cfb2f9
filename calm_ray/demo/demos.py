"""The models that come with questions of their own: `model: world` and `model: atlas`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_ray.core.rows import Question
from calm_ray.core.sections import ATLAS, WORLD

Questions = tuple[list[Question], list[Question]]
"""To align on, and held out."""


@dataclass(frozen=True)
class Demo:
    languages: Callable[[], list[str]]
    questions: Callable[[int, Sequence[str]], Questions]
    """Takes `world.seed` and some of the languages."""
    model: Callable[[int], tuple[Path, str]]
    """Makes the model for `world.seed` unless it is cached; returns its folder in the cache and its hash."""


def _world_languages() -> list[str]:
    from calm_ray.demo.generator import world_languages

    return world_languages()


def _world_questions(seed: int, languages: Sequence[str]) -> Questions:
    from calm_ray.demo.generator import build_world, world_questions

    parts = world_questions(build_world(seed))
    align, held_out = ([row for row in part if row["language"] in languages] for part in parts)
    return align, held_out


def _world_model(seed: int) -> tuple[Path, str]:
    from calm_ray.demo.generator import build_world
    from calm_ray.demo.pretraining import world_model

    return world_model(build_world(seed))


def _atlas_languages() -> list[str]:
    from calm_ray.demo.atlas.questions import atlas_languages

    return atlas_languages()


def _atlas_questions(seed: int, languages: Sequence[str]) -> Questions:
    from calm_ray.demo.atlas.questions import build_atlas

    atlas = build_atlas(seed, languages)
    return atlas.align, atlas.held_out


def _atlas_model(seed: int) -> tuple[Path, str]:
    from calm_ray.demo.atlas.model import atlas_model

    return atlas_model()


DEMOS = {
    WORLD: Demo(_world_languages, _world_questions, _world_model),
    ATLAS: Demo(_atlas_languages, _atlas_questions, _atlas_model),
}
