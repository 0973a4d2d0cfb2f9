"""A small world generated from a seed: towns, facts about them, and barriers to stating those facts in a language.

What the model *knows* is the same in every language: every fact is stated in all of them. What it *says* when asked
differs: a language and topic may have a barrier, behind which questions are mostly answered by habit (the first option,
or the topic's popular value) and only sometimes from knowledge. This is CALM, Figure 1, in miniature. A barrier belongs
to (language, topic), never to a town, so that barriers lowered by alignment on some towns can be measured on unseen
ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from calm_ray.core.rows import Question
from calm_ray.prompts.questions import LETTERS, completion_text

TOWNS = 96
ALIGNED_TOWNS = 56
"""Towns used for alignment; the others are held out for evaluation."""
CHOICES = 4
BARRED_LANGUAGES = (1, 2)
"""Minimum and maximum number of languages a topic is barred in."""
BARRIER_STRENGTH = (0.65, 0.85)
"""Range of the fraction of answers behind a barrier that follow the habit."""


@cache
def lexicon() -> dict[str, Any]:
    """The world's vocabulary (`lexicon.yaml`)."""
    return yaml.safe_load(resources.files(__package__).joinpath("lexicon.yaml").read_text("utf-8"))


def world_languages() -> list[str]:
    return list(lexicon()["languages"])


def topics() -> list[str]:
    return list(lexicon()["topics"])


@dataclass(frozen=True)
class Barrier:
    habit: Literal["first", "popular"]
    strength: float


@dataclass(frozen=True)
class World:
    """The facts and barriers generated from one seed."""

    seed: int
    towns: list[tuple[int, ...]]
    """Each town as the indices of its syllables."""
    facts: dict[tuple[int, str], int]
    """(town, topic) -> index of the true value."""
    popular: dict[str, int]
    """topic -> value that the habit favors."""
    barriers: dict[tuple[str, str], Barrier]
    """(language, topic) -> barrier, if there is one."""

    def name(self, town: int, language: str) -> str:
        words = lexicon()
        script = words["scripts"][language]
        name = "".join(words["syllables"][script][i] for i in self.towns[town])
        return name.capitalize()

    def statement(self, town: int, topic: str, value: int, language: str) -> str:
        words = lexicon()["topics"][topic]
        return words["statement"][language].format(
            name=self.name(town, language), value=words["values"][language][value]
        )

    def question(self, town: int, topic: str, options: list[int], language: str) -> Question:
        words = lexicon()["topics"][topic]
        return Question(
            question_id=f"{topic}-{self.name(town, 'en').lower()}",
            language=language,
            text=words["question"][language].format(name=self.name(town, language)),
            choices=[words["values"][language][option] for option in options],
            gold=LETTERS[options.index(self.facts[town, topic])],
            subject=topic,
        )

    def answer(self, town: int, topic: str, option: int, options: list[int], language: str) -> str:
        """A completion that answers `option` and explains it with the statement that would make it right."""
        explanation = self.statement(town, topic, option, language)
        return completion_text(language, explanation, LETTERS[options.index(option)])

    def answers(self, question: Question) -> list[str]:
        """A completion for each choice of one of this world's questions."""
        topic, _, name = question["question_id"].partition("-")
        town = _town_of(self, name)
        values = lexicon()["topics"][topic]["values"][question["language"]]
        options = [values.index(choice) for choice in question["choices"]]
        return [self.answer(town, topic, option, options, question["language"]) for option in options]

    def draw_options(self, town: int, topic: str, rng: random.Random) -> list[int]:
        """The true value, usually the popular one, and others, in random order."""
        true, popular = self.facts[town, topic], self.popular[topic]
        count = len(lexicon()["topics"][topic]["values"]["en"])
        options = [true]
        if popular != true and rng.random() < 0.7:
            options.append(popular)
        options += rng.sample([i for i in range(count) if i not in options and i != popular], CHOICES - len(options))
        rng.shuffle(options)
        return options

    def habitual_option(self, topic: str, options: list[int], language: str) -> int | None:
        """The option the habit picks behind the barrier; None if there is no barrier."""
        barrier = self.barriers.get((language, topic))
        if barrier is None:
            return None
        popular = self.popular[topic]
        return popular if barrier.habit == "popular" and popular in options else options[0]


def _town_of(world: World, name: str) -> int:
    """The town named in a question's id."""
    return next(town for town in range(TOWNS) if world.name(town, "en").lower() == name)


def build_world(seed: int) -> World:
    """Builds the world of a seed, the same on every machine."""
    rng = random.Random(f"world-{seed}")
    syllables = len(lexicon()["syllables"]["latin"])
    names: list[tuple[int, ...]] = [
        (a, b, c) for a in range(syllables) for b in range(syllables) for c in range(syllables) if a != b != c
    ]
    towns = rng.sample(names, TOWNS)
    facts: dict[tuple[int, str], int] = {}
    for topic in topics():
        # Each value holds for the same number of towns, so guessing the most common one gains nothing.
        count = len(lexicon()["topics"][topic]["values"]["en"])
        values = [i % count for i in range(TOWNS)]
        rng.shuffle(values)
        facts.update({(town, topic): value for town, value in enumerate(values)})
    popular = {topic: rng.randrange(len(lexicon()["topics"][topic]["values"]["en"])) for topic in topics()}
    return World(seed, towns, facts, popular, _draw_barriers(rng))


def _draw_barriers(rng: random.Random) -> dict[tuple[str, str], Barrier]:
    """Bars every topic in one or two languages, spread evenly so that every language is the best at something."""
    barriers: dict[tuple[str, str], Barrier] = {}
    load = dict.fromkeys(world_languages(), 0)
    for number, topic in enumerate(rng.sample(topics(), len(topics()))):
        count = BARRED_LANGUAGES[0] if number % 3 == 0 else BARRED_LANGUAGES[1]
        barred = sorted(load, key=lambda code: (load[code], rng.random()))[:count]
        for code in barred:
            load[code] += 1
            habit: Literal["first", "popular"] = "first" if rng.random() < 0.5 else "popular"
            barriers[code, topic] = Barrier(habit, rng.uniform(*BARRIER_STRENGTH))
    return barriers


def world_questions(world: World) -> tuple[list[Question], list[Question]]:
    """Alignment and held-out questions, about different towns, in every language.

    One question per (town, topic), with its choices in the same random order in every language.
    """
    rng = random.Random(f"questions-{world.seed}")
    order = rng.sample(range(TOWNS), TOWNS)
    split: tuple[list[Question], list[Question]] = ([], [])
    for position, town in enumerate(order):
        part = split[0] if position < ALIGNED_TOWNS else split[1]
        for topic in topics():
            options = world.draw_options(town, topic, rng)
            part.extend(world.question(town, topic, options, language) for language in world_languages())
    return split
