"""Extracts the answer letter from a completion."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from calm_ray.core.languages import Language, language_row
from calm_ray.prompts.questions import LETTERS

# Allowed around a marker or a letter: markdown, brackets, quotes, and the invisible marks that position a Latin letter
# in right-to-left text. Full-width forms are already normalized to plain ones.
_QUOTES = (
    "*_`'\"“”„‘’«»‹›()[]{}<>〈〉《》「」『』【】〔〕﴾﴿"
    "\u200b\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
)
_FINAL = ".,:;!?،؛؟۔।॥。、"
_AROUND, _END = re.escape(_QUOTES), re.escape(_FINAL)
_WRAPPING = rf"[\s\-{_AROUND}]*+"
_COLON = ":∶"
# Only Latin characters continue a word after a letter: Chinese and Japanese have no spaces.
_LATIN = r"[A-Za-z0-9\u00c0-\u024f]"
_SAME_LINE = re.compile(rf"[\s{_AROUND}]*+(.*)")
_NOT_A_LETTER = re.compile(r"[\W_]+")
# Matches in "A dog", but not in "A et D", where the first letter is the answer.
_NEXT_IS_A_WORD = re.compile(r"['’]?[ \t]+(?!\w{1,4}[ \t]+[A-Z](?!\w))[^\W_]")


@dataclass(frozen=True)
class _Reader:
    """How to parse one language's answers: the marker's word, what may follow it (`lead`), then the letter."""

    word: str
    """The marker's word as in the language table."""
    spellings: list[str]
    """Normalized case variants of the word, all of the same length."""
    lead: re.Pattern[str]
    letter: re.Pattern[str]
    words: str
    """The language's one-letter words, as written inside a sentence."""


def extract_answer(text: str, language: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """Returns the letter after the last answer marker that is followed by an answer.

    `language` is a code of the language table or a dataset's alias for one (`cn`). The marker is the answer word with a
    colon at the start of a line, as prompts request it. If no such marker has an answer, the word counts with a colon
    anywhere, or with a verb as in "the answer is B". Of several letters ("A or B") the first counts. With `choices`,
    parallel to `letters`, the text of exactly one choice counts as its letter. Text is compared in Unicode's
    compatibility form (NFKC), which maps full-width colons and letters to plain ones.

    Returns a letter of `letters` (the question's, `ABCD` for four choices), or None if the answer is unparseable: there
    is no marker, whatever the prose says, or the marker is followed by two letters ("BC") or by a word, even a
    one-letter word ("I cannot tell"). Raises InputError for a language that is not in the table.
    """
    reader = _reader(language)
    if not text.isascii():
        # The last marker nearly always has an answer, so the long explanation before it need not be normalized.
        marker = text.rfind("\n", 0, max(0, text.rfind(reader.word))) + 1
        answer, as_requested = _last_answer(reader, _plain(text[marker:]), letters, choices)
        if as_requested:
            return answer
        text = _plain(text)
    return _last_answer(reader, text, letters, choices)[0]


def _last_answer(reader: _Reader, plain: str, letters: str, choices: Sequence[str]) -> tuple[str | None, bool]:
    """Returns the answer, and whether its marker is as requested: with a colon, at the start of a line.

    Such an answer takes precedence: later prose ("The best answer is ...") does not override it.
    """
    end, in_prose = len(plain), None
    while (start := max([plain.rfind(word, 0, end) for word in reader.spellings])) >= 0:
        lead = reader.lead.match(plain, start + len(reader.spellings[0]))
        if lead and (answer := _read(reader, plain, lead.end(), letters, choices)):
            if plain[lead.end() - 1] in _COLON and not _bare(plain[plain.rfind("\n", 0, start) + 1 : start]):
                return answer, True
            in_prose = in_prose or answer
        end = start
    return in_prose, False


def _read(reader: _Reader, plain: str, start: int, letters: str, choices: Sequence[str]) -> str | None:
    """Returns the answer at `start`, where a marker ends."""
    found = reader.letter.match(plain, start)
    letter = found["letter"].upper() if found else ""
    if found is None or letter not in letters:
        return _choice_at(plain, start, letters, choices)
    after = found.end()
    if letter == letters[0]:
        echo = _NOT_A_LETTER.sub("", plain[after - 1 :].partition("\n")[0])
        if len(echo) >= min(3, len(letters)) and LETTERS.startswith(echo):
            return None  # echoes the requested form: "<A, B, C, D>"
    # After a colon any word may be capitalized; inside a sentence only those that always are.
    words = reader.words.upper() if plain[start - 1] in _COLON else reader.words
    is_word = found["letter"] in words and not found["option"] and _NEXT_IS_A_WORD.match(plain, after)
    read = None if is_word else letter
    if not choices or plain.startswith("\n", after) or after == len(plain):
        return read
    # The rest may be the text of this choice ("A town"), or of another one together with the letter ("E. coli").
    rest = _bare(plain[after:].partition("\n")[0])
    if not rest or _by_text(letters, tuple(choices)).get(rest) == letter:
        return letter
    return _choice_at(plain, start, letters, choices) or read


def _choice_at(plain: str, start: int, letters: str, choices: Sequence[str]) -> str | None:
    """Returns the letter of the choice whose text is the line at `start`."""
    line = _SAME_LINE.match(plain, start) if choices else None
    return _by_text(letters, tuple(choices)).get(_bare(line[1])) if line else None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _bare(text: str) -> str:
    return _plain(text).casefold().strip(f" \t\r\n{_QUOTES}{_FINAL}")


@lru_cache(maxsize=4096)  # completions of the same question come in sequence
def _by_text(letters: str, choices: tuple[str, ...]) -> dict[str, str]:
    """Maps each choice's bare text, alone and after its letter ("B电网"), to the letter. Drops ambiguous texts."""
    lettered = [(letter, _bare(choice)) for letter, choice in zip(letters, choices, strict=False)]
    names = [(name, letter) for letter, text in lettered if text for name in (text, letter.lower() + text)]
    occurrences = Counter(name for name, _ in names)
    return {name: letter for name, letter in names if occurrences[name] == 1}


@cache
def _reader(language: str) -> _Reader:
    row = language_row(language)
    word = row.answer_word
    spellings = {_plain(form) for form in (word, word.lower(), word.upper(), word.capitalize())}
    lead, letter = (re.compile(pattern, re.MULTILINE) for pattern in (_lead(row), _letter(row)))
    return _Reader(word, sorted(spellings), lead, letter, row.words)


def _phrases(alternatives: str) -> str:
    """Turns a field of the language table into a pattern that ignores case and word spacing."""
    spaced = _plain(alternatives).replace(" ", r"\s+")
    return f"(?i:{spaced})"


def _lead(row: Language) -> str:
    """Pattern for the text between the answer word and the answer."""
    right = rf"(?:\s*+{_phrases(row.right)})?" if row.right else ""
    if row.copula:
        sentence = rf"\s*+{_phrases(row.copula)}(?:{_WRAPPING}[{_COLON}])?"
    else:  # without a copula, a verb after the letter ("उत्तर B है") or the end of the line marks an answer
        option = rf"(?:{_phrases(row.option)}{_WRAPPING})?"
        sentence = rf"\s(?={_WRAPPING}{option}[A-Za-z]{_WRAPPING}(?:{_phrases(row.verb)}|[{_END}]*[ \t\r]*$))"
    return rf"{right}(?:{_WRAPPING}[{_COLON}]|{sentence})"


def _letter(row: Language) -> str:
    """Pattern for the letter and what surrounds it, except in "Beide", "C'est", "D-Vitamin" or "E.g."."""
    part = r"['’‐-][^\W_]|\.[a-z](?![^\W_])"
    verb = rf"(?={_phrases(row.verb)})|" if row.verb else ""
    capital = rf"[A-Z](?:{verb}(?!{_LATIN}|{part}))"
    small = rf"[a-z](?:{verb}(?!{part})(?=[{_AROUND}{_END}]|[ \t\r]*$))"
    option = rf"(?P<option>{_phrases(row.option)}{_WRAPPING})?"
    return rf"{_WRAPPING}{option}(?P<letter>{capital}|{small})"
