"""Which letter did a completion answer with?"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES, Language, language_code
from calm_ray.prompts.questions import LETTERS

# What may stand around a marker or a letter: markdown, brackets, quotes, and the invisible marks that keep a Latin
# letter in its place among words written from right to left. Full-width forms have become plain ones by then.
_QUOTES = (
    "*_`'\"“”„‘’«»‹›()[]{}<>〈〉《》「」『』【】〔〕﴾﴿"
    "\u200b\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
)
_FINAL = ".,:;!?،؛؟۔।॥。、"
_AROUND, _END = re.escape(_QUOTES), re.escape(_FINAL)
_DRESS = rf"[\s\-{_AROUND}]*+"
_COLON = ":∶"
# A letter before another script stands alone: Chinese and Japanese write no spaces.
_LATIN = r"[A-Za-z0-9\u00c0-\u024f]"
_SAME_LINE = re.compile(rf"[\s{_AROUND}]*+(.*)")
# "A dog", but not "A et D", which begins with the letter that counts.
_NOT_A_LETTER = re.compile(r"[\W_]+")
_NEXT_IS_A_WORD = re.compile(r"['’]?[ \t]+(?!\w{1,4}[ \t]+[A-Z](?!\w))[^\W_]")


@dataclass(frozen=True)
class _Reader:
    """How one language's answers are read: the marker's word, what may follow it (`lead`), then the letter."""

    word: str
    """The marker's word as the table has it."""
    spellings: list[str]
    """The plain forms of the word, in small letters and with capitals, all of one length."""
    lead: re.Pattern[str]
    letter: re.Pattern[str]
    words: str
    """The language's words of a single letter, as written inside a sentence."""


def extract_answer(text: str, language: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that follows the language's answer marker, the last one that is followed by an answer.

    `language` is a code of the language table, or a data set's way to write one (`cn`). The marker is the answer's
    word with a colon at the start of a line, as completions are asked to write it; where no such marker has an answer,
    the word with a colon anywhere, or with the verb of a sentence such as "the answer is B". Of several letters ("A or
    B") the first counts. With `choices`, parallel to `letters`, the text of exactly one choice counts as its letter.
    Text is compared in Unicode's compatibility form (NFKC), in which full-width colons and letters are plain ones.

    Returns a letter of `letters` (the question's, `ABCD` for four choices), or None where none can be read: a
    completion without the marker is unreadable, however its prose reads, and so is one whose marker is followed by
    two letters ("BC") or by a word, be it a single letter long ("I cannot tell"). Raises InputError for a language
    that is not in the table.
    """
    reader = _reader(language)
    if not text.isascii():
        # Nearly always the last marker has an answer: the explanation before it, which is long, need not be normalised.
        marker = text.rfind("\n", 0, max(0, text.rfind(reader.word))) + 1
        answer, was_asked_for = _last_answer(reader, _plain(text[marker:]), letters, choices)
        if was_asked_for:
            return answer
        text = _plain(text)
    return _last_answer(reader, text, letters, choices)[0]


def _last_answer(reader: _Reader, plain: str, letters: str, choices: Sequence[str]) -> tuple[str | None, bool]:
    """The answer, and whether it stands behind a marker as it was asked for: with a colon, at the start of a line.

    That one goes before anything else: what is said afterwards ("The best answer is ...") does not undo it.
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
    """The answer at `start`, where a marker has just ended."""
    found = reader.letter.match(plain, start)
    letter = found["letter"].upper() if found else ""
    if found is None or letter not in letters:
        return _written_out(plain, start, letters, choices)
    after = found.end()
    if letter == letters[0]:
        said = _NOT_A_LETTER.sub("", plain[after - 1 :].partition("\n")[0])
        if len(said) >= min(3, len(letters)) and LETTERS.startswith(said):
            return None  # the form that was asked for, said back: "<A, B, C, D>"
    # After a colon any word may begin with a capital; inside a sentence only those that always do.
    words = reader.words.upper() if plain[start - 1] in _COLON else reader.words
    is_word = found["letter"] in words and not found["option"] and _NEXT_IS_A_WORD.match(plain, after)
    read = None if is_word else letter
    if not choices or plain.startswith("\n", after) or after == len(plain):
        return read
    # "A town" where A is the town, and "E. coli" where that is what another letter stands for.
    rest = _bare(plain[after:].partition("\n")[0])
    if not rest or _by_text(letters, tuple(choices)).get(rest) == letter:
        return letter
    return _written_out(plain, start, letters, choices) or read


def _written_out(plain: str, start: int, letters: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice whose text is the line at `start`."""
    line = _SAME_LINE.match(plain, start) if choices else None
    return _by_text(letters, tuple(choices)).get(_bare(line[1])) if line else None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _bare(text: str) -> str:
    return _plain(text).casefold().strip(f" \t\r\n{_QUOTES}{_FINAL}")


@lru_cache(maxsize=4096)  # the completions of a question come one after the other
def _by_text(letters: str, choices: tuple[str, ...]) -> dict[str, str]:
    """The choices' letters by bare text, and by letter and text in one ("B电网"); a name of several is left out."""
    lettered = [(letter, _bare(choice)) for letter, choice in zip(letters, choices, strict=False)]
    names = [(name, letter) for letter, text in lettered if text for name in (text, letter.lower() + text)]
    times = Counter(name for name, _ in names)
    return {name: letter for name, letter in names if times[name] == 1}


@cache
def _reader(language: str) -> _Reader:
    code = language_code(language)
    if code is None:
        raise InputError(f"language {language!r} is not in the language table; it has {', '.join(LANGUAGES)}")
    row = LANGUAGES[code]
    word = row.answer_word
    spellings = {_plain(form) for form in (word, word.lower(), word.upper(), word.capitalize())}
    lead, letter = (re.compile(pattern, re.MULTILINE) for pattern in (_lead(row), _letter(row)))
    return _Reader(word, sorted(spellings), lead, letter, row.words)


def _phrases(alternatives: str) -> str:
    """A field of the language table as a pattern: capitals do not matter, nor how words are spaced."""
    spaced = _plain(alternatives).replace(" ", r"\s+")
    return f"(?i:{spaced})"


def _lead(row: Language) -> str:
    """From the end of the answer's word to where the answer begins."""
    right = rf"(?:\s*+{_phrases(row.right)})?" if row.right else ""
    if row.copula:
        sentence = rf"\s*+{_phrases(row.copula)}(?:{_DRESS}[{_COLON}])?"
    else:  # the verb is what tells "उत्तर B है" from prose, or the sentence ends with the letter
        option = rf"(?:{_phrases(row.option)}{_DRESS})?"
        sentence = rf"\s(?={_DRESS}{option}[A-Za-z]{_DRESS}(?:{_phrases(row.verb)}|[{_END}]*[ \t\r]*$))"
    return rf"{right}(?:{_DRESS}[{_COLON}]|{sentence})"


def _letter(row: Language) -> str:
    """The letter in its dress, and not as a part of something: "Beide", "C'est", "D-Vitamin", "E.g."."""
    part = r"['’‐-][^\W_]|\.[a-z](?![^\W_])"
    verb = rf"(?={_phrases(row.verb)})|" if row.verb else ""
    capital = rf"[A-Z](?:{verb}(?!{_LATIN}|{part}))"
    small = rf"[a-z](?:{verb}(?!{part})(?=[{_AROUND}{_END}]|[ \t\r]*$))"
    option = rf"(?P<option>{_phrases(row.option)}{_DRESS})?"
    return rf"{_DRESS}{option}(?P<letter>{capital}|{small})"
