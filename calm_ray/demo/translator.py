"""The demo world's translator: exact, because every statement has exactly one form in each language."""

from __future__ import annotations

import re
from collections.abc import Sequence

from calm_ray.demo.generator import TOWNS, World, lexicon, world_languages
from calm_ray.prompts.passages import Passage
from calm_ray.prompts.questions import completion_text


class WorldTranslator:
    """Parses a completion into (town, topic, value, letter) and renders it in another language.

    Completions that do not have the world's form cannot be translated (None).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._towns = {(code, world.name(town, code)): town for code in world_languages() for town in range(TOWNS)}
        self._patterns = {
            (code, topic): re.compile(_pattern(words["statement"][code], code))
            for code in world_languages()
            for topic, words in lexicon()["topics"].items()
        }

    def translate(self, passages: Sequence[Passage]) -> list[str | None]:
        return [self._translate_one(passage) for passage in passages]

    def _translate_one(self, passage: Passage) -> str | None:
        for topic, words in lexicon()["topics"].items():
            found = self._patterns[passage.source, topic].fullmatch(passage.text)
            town = self._towns.get((passage.source, found["name"])) if found else None
            if found and town is not None and found["value"] in words["values"][passage.source]:
                value = words["values"][passage.source].index(found["value"])
                statement = self._world.statement(town, topic, value, passage.target)
                return completion_text(passage.target, statement, found["answer"])
        return None


def _pattern(statement: str, language: str) -> str:
    form = re.escape(completion_text(language, statement, "{answer}"))
    for field in ("name", "value", "answer"):
        form = form.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>.+)")
    return form
