"""Reads and rewrites answers in a model's own words, by the one choice that a text names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from calm_ray.core.languages import language_row

_WORD = re.compile(r"[^\W_]+")
Span = tuple[int, int]


@dataclass(frozen=True)
class _Choice:
    text: re.Pattern[str]
    """Matches its whole text, as words."""
    own_words: frozenset[str]
    """Words that no other choice has."""


def named_choice(text: str, language: str, choices: Sequence[str]) -> int | None:
    """Returns the index of the only choice that `text` names, None if it names none or several.

    A choice is named by its whole text, or by a word of it that no other choice has: "dollar" names "US Dollar", unless
    another choice is a dollar too. Whole texts take precedence, and the longer one where one contains another. Ignores
    case and Unicode's compatibility forms. Raises InputError for a language that is not in the language table.
    """
    text = _plain(text)
    known = _choices(language, tuple(choices))
    spans = [[match.span() for match in choice.text.finditer(text)] for choice in known]
    named = [i for i, own in enumerate(spans) if any(not _is_inside(span, spans) for span in own)]
    if not named:
        words = set(_WORD.findall(text.casefold()))
        named = [i for i, choice in enumerate(known) if choice.own_words & words]
    return named[0] if len(named) == 1 else None


def with_choice(text: str, language: str, choices: Sequence[str], new: int) -> str:
    """Returns `text` with the choice `new` in place of the one that it names; the new choice alone where `text` does
    not name one by its whole text."""
    old = named_choice(text, language, choices)
    if old is None:
        return choices[new]
    changed, count = _choices(language, tuple(choices))[old].text.subn(lambda _: choices[new], _plain(text))
    return changed if count else choices[new]


def _is_inside(span: Span, spans: Sequence[Sequence[Span]]) -> bool:
    """Whether a match is part of a longer one."""
    start, end = span
    return any(first <= start and end <= last and last - first > end - start for own in spans for first, last in own)


@lru_cache(maxsize=4096)  # completions of the same question come in sequence
def _choices(language: str, choices: tuple[str, ...]) -> list[_Choice]:
    # Scripts without spaces have no word boundaries.
    before, after = (r"(?<![^\W_])", r"(?![^\W_])") if language_row(language).space else ("", "")
    texts = [_plain(choice).strip() for choice in choices]
    words = [set(_WORD.findall(text.casefold())) for text in texts]
    occurrences = Counter(word for own in words for word in own)
    return [
        _Choice(
            re.compile(f"{before}{re.escape(text)}{after}", re.IGNORECASE) if text else re.compile(r"(?!)"),
            frozenset(word for word in own if occurrences[word] == 1),
        )
        for text, own in zip(texts, words, strict=True)
    ]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)
