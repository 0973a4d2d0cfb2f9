"""Questions about the countries of the world, in every language of `wording.yaml`, from the names in the Unicode CLDR.

A territory has a question on a topic if exactly one value is right: one currency in use, one official language, or a
capital for which the CLDR names a time zone. Territories with over a million people (GeoNames) are in
`territories.txt`, with the time zone of their capital.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import yaml

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.prompts.questions import LETTERS

if TYPE_CHECKING:
    from babel import Locale

CHOICES = 4
HELD_OUT_FRACTION = 0.4
"""Fraction of the territories that alignment never sees."""
HELD_OUT_TOPIC = "capital"
"""A topic that alignment never sees either."""


@cache
def wording() -> dict[str, dict[str, str]]:
    """Question templates by language and topic."""
    text = resources.files(__package__).joinpath("wording.yaml").read_text("utf-8")
    templates: dict[str, dict[str, str]] = yaml.safe_load(text)
    return templates


def atlas_languages() -> list[str]:
    return list(wording())


@cache
def territories() -> dict[str, str | None]:
    """ISO 3166 codes with the time zone of the capital, None if it has none of its own."""
    lines = resources.files(__package__).joinpath("territories.txt").read_text("utf-8").splitlines()
    return {code: zone or None for code, _, zone in (line.partition(" ") for line in lines)}


def _currencies(territory: str) -> Sequence[str]:
    from babel.numbers import get_territory_currencies

    return [str(code) for code in get_territory_currencies(territory)]


def _languages(territory: str) -> Sequence[str]:
    from babel.languages import get_official_languages

    return list(dict.fromkeys(code.partition("_")[0] for code in get_official_languages(territory, de_facto=True)))


def _capitals(territory: str) -> Sequence[str]:
    zone = territories()[territory]
    return [zone] if zone is not None else []


def _city(locale: Locale, zone: str) -> str | None:
    return locale.time_zones.get(zone, {}).get("city") or zone.rpartition("/")[2].replace("_", " ")


@dataclass(frozen=True)
class Topic:
    values: Callable[[str], Sequence[str]]
    """The right values for a territory."""
    name: Callable[[Locale, str], str | None]
    """A value's name in a language; None if the CLDR has none."""


TOPICS: Mapping[str, Topic] = {
    "currency": Topic(_currencies, lambda locale, code: locale.currencies.get(code)),
    "language": Topic(_languages, lambda locale, code: locale.languages.get(code)),
    "capital": Topic(_capitals, _city),
}


@dataclass
class Atlas:
    """The questions of one seed, in some languages."""

    align: list[Question] = field(default_factory=list)
    held_out: list[Question] = field(default_factory=list)
    """About territories, or on a topic, that `align` has no question about."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Questions left out, by reason."""


def build_atlas(seed: int, languages: Sequence[str]) -> Atlas:
    """Draws the held-out territories and each question's wrong options and their order by seed.

    A question is left out where the CLDR has no name in one of the languages, or where two options have the same name.
    Raises InputError for an unknown language, if babel is not installed, or for a topic with fewer than four values.
    """
    locales = _locales(languages)
    atlas = Atlas()
    rng = random.Random(f"atlas-{seed}")
    codes = list(territories())
    held_out = set(rng.sample(codes, round(HELD_OUT_FRACTION * len(codes))))
    for subject, topic in TOPICS.items():
        right = {code: values[0] for code in codes if len(values := topic.values(code)) == 1}
        known = sorted(set(right.values()))
        if len(known) < CHOICES:
            raise InputError(f"the atlas has only {len(known)} values of {subject}, but a question needs {CHOICES}")
        for code, value in right.items():
            options = [value, *rng.sample([other for other in known if other != value], CHOICES - 1)]
            rng.shuffle(options)
            rows = _rows(subject, topic, code, options, options.index(value), locales, atlas.dropped)
            if code in held_out:
                atlas.held_out += rows
            elif subject != HELD_OUT_TOPIC:
                atlas.align += rows
    return atlas


def _locales(languages: Sequence[str]) -> dict[str, Locale]:
    try:
        from babel import Locale
    except ImportError:
        raise InputError("the atlas needs babel: pip install 'calm_ray[atlas]'") from None
    for language in languages:
        if language not in wording():
            raise InputError(f"languages: the atlas has {', '.join(wording())}, but not {language}")
    return {language: Locale.parse(language) for language in languages}


def _rows(
    subject: str,
    topic: Topic,
    territory: str,
    options: Sequence[str],
    gold: int,
    locales: Mapping[str, Locale],
    dropped: Counter[str],
) -> list[Question]:
    """The question in every language; empty, and counted, if it cannot be asked in one of them."""
    rows: list[Question] = []
    for language, locale in locales.items():
        name = locale.territories.get(territory)
        choices = [topic.name(locale, option) for option in options]
        if name is None or None in choices:
            dropped[f"{subject}: no name in {language}"] += 1
            return []
        if len({str(choice).casefold() for choice in choices}) < len(choices):
            dropped[f"{subject}: options with the same name in {language}"] += 1
            return []
        rows.append(
            Question(
                question_id=f"{subject}-{territory}",
                language=language,
                text=wording()[language][subject].format(territory=name),
                choices=[str(choice) for choice in choices],
                gold=LETTERS[gold],
                subject=subject,
            )
        )
    return rows
