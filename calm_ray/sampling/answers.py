"""Which letter did a completion answer with?"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from calm_ray.languages import LANGUAGES

# What may stand around a marker or a letter: markdown, brackets, quotes.
_DRESS = r"""[\s*_`"'“”«»‹›「」『』()\[\]{}<>-]*"""
# The letter stands alone: "B", "B. eagle", "b)", but neither the "B" of "Beide" nor the word "a".
_LETTER = re.compile(rf"{_DRESS}([A-Z](?![^\W_])|[a-z](?=[).:,;\]*_]|\s*$))", re.MULTILINE)


@cache
def _marker(language: str) -> re.Pattern[str]:
    word = unicodedata.normalize("NFKC", LANGUAGES[language].answer_word)
    return re.compile(rf"{re.escape(word)}{_DRESS}:", re.IGNORECASE)


def extract_answer(text: str, language: str, letters: str) -> str | None:
    """The letter that follows the language's answer marker, the last one that is followed by a letter.

    Text is compared in Unicode's compatibility form, so full-width colons and letters count as plain ones.
    Returns a letter of `letters` (the question's, `ABCD` for four choices), or None where none can be read:
    a completion without the marker is unreadable, however its prose reads.
    """
    plain = unicodedata.normalize("NFKC", text)
    for marker in reversed(list(_marker(language).finditer(plain))):
        letter = _LETTER.match(plain, marker.end())
        if letter and letter[1].upper() in letters:
            return letter[1].upper()
    return None
