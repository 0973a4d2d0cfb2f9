"""Texts to translate, and the translator interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """A completion to translate. The translation must keep `answer`, one of `letters`; None if it has none."""

    text: str
    source: str
    target: str
    answer: str | None
    letters: str


class Translator(Protocol):
    def translate(self, passages: Sequence[Passage]) -> list[str | None]:
        """Returns each passage in its target language, or None if translation failed."""
        ...
