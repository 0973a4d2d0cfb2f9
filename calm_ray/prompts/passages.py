"""A text to translate, and whatever translates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """A completion to carry over. Its answer must survive as `answer`, one of `letters`; None where none is asked."""

    text: str
    source: str
    target: str
    answer: str | None
    letters: str


class Translator(Protocol):
    def carry(self, passages: Sequence[Passage]) -> list[str | None]:
        """Each passage in its target language, or None where that failed."""
        ...
