"""Translates questions into the languages they lack (CALM, section 2.1): a monolingual file becomes a parallel one.

The options of a translated question keep their letters, so that votes across languages mean the same option. A question
that could not be translated, or came back unchanged, has no row in that language: it must not vote there.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, cast

from calm_ray.core.console import progress_bar, say
from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import Question, rows_of, table
from calm_ray.prompts.questions import LETTERS
from calm_ray.run.storage import Storage

BATCH = 64
"""Questions sent to a translator, or written to the cache, together."""


@dataclass(frozen=True)
class Wording:
    text: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A request to a translator. Questions with the same wording share one."""

    wording: Wording
    source: str
    target: str

    @property
    def folder(self) -> str:
        return f"{self.source}-{self.target}"

    def key(self, translator: str) -> str:
        """Cache key of the translation: a SHA-256 hex digest."""
        content = [translator, self.source, self.target, self.wording.text, *self.wording.choices]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


Answer = tuple[Request, Wording | None]  # None if the translation failed


class QuestionTranslator(Protocol):
    @property
    def identity(self) -> str:
        """Covers everything that affects the output: translators with the same identity share translations."""

    def check(self, source: str, targets: Sequence[str]) -> None:
        """Raises InputError for an unsupported language, before anything is started."""

    def translate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yields each request that got a reply once, with its translation, as soon as it is ready, in any order."""


class Count(TypedDict):
    """Outcomes for a language's missing questions: `asked` = `translated` + `failed` + `identical`."""

    asked: int
    cached: int
    """Found in the cache, whatever the outcome."""
    translated: int
    failed: int
    identical: int
    """Came back unchanged: nothing was translated."""


Report = dict[str, Count]
"""By target language, in the order of the languages."""


def translate_missing(
    questions: Sequence[Question],
    languages: Sequence[str],
    translator: QuestionTranslator,
    storage: Storage,
) -> tuple[list[Question], Report]:
    """Adds the rows missing in `languages`, each translated from the first of them that its question has.

    Returns all rows grouped by question, in the order of `languages` followed by any other languages, and the outcomes
    for the missing ones. `storage` is the cache's root. Raises InputError for languages that the translator does not
    support.
    """
    by_id: dict[str, dict[str, Question]] = {}
    for row in questions:
        by_id.setdefault(row["question_id"], {})[row["language"]] = row
    wanted = {
        (question_id, target): _request(rows, languages, target)
        for target in languages
        for question_id, rows in by_id.items()
        if target not in rows
    }
    if not wanted:
        return _in_order(by_id, languages), {}
    targets = list(dict.fromkeys(target for _, target in wanted))
    for source in dict.fromkeys(request.source for request in wanted.values()):
        translator.check(source, list(dict.fromkeys(r.target for r in wanted.values() if r.source == source)))
    answers, cached = _answers(list(wanted.values()), translator, TranslationCache(storage, translator.identity))
    report = {target: Count(asked=0, cached=0, translated=0, failed=0, identical=0) for target in targets}
    for (question_id, target), request in wanted.items():
        wording, count = answers.get(request), report[target]
        count["asked"] += 1
        count["cached"] += request in cached
        if wording is None:
            count["failed"] += 1
        elif is_identical(request.wording.text, wording.text):
            count["identical"] += 1
        else:
            count["translated"] += 1
            rows = by_id[question_id]
            words = {"language": target, "text": wording.text, "choices": list(wording.choices)}
            rows[target] = cast(Question, {**rows[request.source], **words})
    return _in_order(by_id, languages), report


def check_codes(languages: Sequence[str]) -> None:
    """Raises InputError for a language that is not in `LANGUAGES`."""
    for language in languages:
        if language not in LANGUAGES:
            raise InputError(f"languages: unknown language {language!r}; known languages: {', '.join(LANGUAGES)}")


def _request(rows: Mapping[str, Question], languages: Sequence[str], target: str) -> Request:
    source = next(code for code in [*languages, *rows] if code in rows)
    return Request(Wording(rows[source]["text"], tuple(rows[source]["choices"])), source, target)


def _in_order(by_id: Mapping[str, Mapping[str, Question]], languages: Sequence[str]) -> list[Question]:
    return [rows[code] for rows in by_id.values() for code in dict.fromkeys([*languages, *rows]) if code in rows]


def _answers(
    requests: Sequence[Request], translator: QuestionTranslator, cache: TranslationCache
) -> tuple[dict[Request, Wording | None], set[Request]]:
    """Returns the answer to every request that got one, and the requests answered from the cache."""
    distinct = list(dict.fromkeys(requests))
    answers = cache.read(distinct)
    cached, unknown = set(answers), [request for request in distinct if request not in answers]
    if not unknown:
        return answers, cached
    failed, fresh = 0, defaultdict[str, list[Answer]](list)
    with progress_bar("translate questions", len(unknown)) as progress:
        for request, wording in translator.translate(unknown):
            answers[request] = wording
            failed += wording is None
            progress.advance(note=f"{failed} failed")
            batch = fresh[request.target]
            batch.append((request, wording))
            if len(batch) == BATCH:
                cache.write(batch)
                batch.clear()
        for batch in filter(None, fresh.values()):
            cache.write(batch)
    if lost := len(distinct) - len(answers):
        say(f"  {lost} questions crashed their engines and got no reply; not cached as failed, so they will be retried")
    return answers, cached


class Translation(TypedDict):
    """A cache entry, keyed by `Request.key`. Produced and consumed by `questions`."""

    key: str
    text: str | None  # None if the translation failed
    choices: list[str]


class TranslationCache:
    """Caches answers in Parquet: one folder per translator and language pair, with write-once files.

    A file is named by the hash of its keys, so that concurrent runs never write different content under the same name.
    Failures are cached too, since a greedy translator would fail the same way again; missing replies are not. To retry
    failures, delete the folder or change the identity (the model, its policy, the maximum reply length).
    """

    def __init__(self, storage: Storage, translator: str) -> None:
        name = re.sub(r"[^\w.-]+", "_", translator)[:60]  # for readers; the hash makes it unique
        self._storage = storage.under(f"{name}-{hashlib.sha256(translator.encode()).hexdigest()[:8]}")
        self._translator = translator

    def read(self, requests: Sequence[Request]) -> dict[Request, Wording | None]:
        """Returns the cached answers."""
        by_key: dict[str, Translation] = {}
        for folder in {request.folder for request in requests}:
            for name in self._storage.files(folder):
                for row in rows_of(self._storage.read_table(f"{folder}/{name}")):
                    by_key.setdefault(row["key"], row)
        known = {request: by_key.get(request.key(self._translator)) for request in requests}
        return {
            request: None if row["text"] is None else Wording(row["text"], tuple(row["choices"]))
            for request, row in known.items()
            if row is not None
        }

    def write(self, answers: Sequence[Answer]) -> None:
        """Writes answers for one language pair to a new file."""
        rows = [
            Translation(key=request.key(self._translator), text=wording.text, choices=list(wording.choices))
            if wording is not None
            else Translation(key=request.key(self._translator), text=None, choices=[])
            for request, wording in answers
        ]
        name = hashlib.sha256("".join(sorted(row["key"] for row in rows)).encode()).hexdigest()
        self._storage.write_table(f"{answers[0][0].folder}/{name}.parquet", table(Translation, rows))


def is_identical(text: str, translated: str) -> bool:
    """Whether two texts differ at most in width, case and whitespace."""
    one, other = (unicodedata.normalize("NFKC", each).casefold().split() for each in (text, translated))
    return one == other


def lines_of(text: str) -> list[str]:
    """The non-empty lines, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def with_lines(text: str, lines: Sequence[str]) -> str:
    """Replaces the `lines_of` a text with `lines`; empty lines stay in place."""
    remaining = iter(lines)
    return "\n".join(next(remaining) if line.strip() else "" for line in text.strip().splitlines())


PROMPT = (
    "Translate the following multiple-choice question from {source} into {target}. Translate the question and every "
    "option. Do not answer it. Keep the lines and their order, and begin each option with its letter ({letters}). "
    "Write only the translation.\n\n{question}\n"
)
# An option as models write it: "B. eagle", "B) eagle", "B：eagle"; letters may be full-width.
_OPTION = re.compile(r"([A-ZＡ-Ｚ])\s*[.．、:：)）]\s*(.+)")


class ModelQuestionTranslator:
    """Translates with the run's own model: one prompt per question, with its lettered options.

    `write` takes up to `batch` messages and returns the model's greedy replies, None for a missing one. `identity` must
    cover what determines a reply: the model, its policy and the maximum reply length; the prompt's hash is added to it.
    """

    def __init__(self, write: Callable[[list[str]], Sequence[str | None]], identity: str, batch: int = BATCH) -> None:
        self._write, self._batch = write, batch
        self.identity = f"{identity} prompt-{hashlib.sha256(PROMPT.encode()).hexdigest()[:8]}"

    def check(self, source: str, targets: Sequence[str]) -> None:
        check_codes([source, *targets])

    def translate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for first in range(0, len(requests), self._batch):
            batch = requests[first : first + self._batch]
            for request, reply in zip(batch, self._write([prompt_of(one) for one in batch]), strict=True):
                if reply is not None:
                    yield request, parse_reply(request.wording, reply)


def prompt_of(request: Request) -> str:
    """The message that asks a model for a translation."""
    wording = request.wording
    lines = [*lines_of(wording.text), *(line for option in _options(wording) for line in option)]
    names = {"source": LANGUAGES[request.source].name, "target": LANGUAGES[request.target].name}
    return PROMPT.format(letters=", ".join(LETTERS[: len(wording.choices)]), question="\n".join(lines), **names)


def _options(wording: Wording) -> list[list[str]]:
    """The lines of every option, the first prefixed with its letter."""
    return [lines_of(f"{letter}. {choice.strip()}") for letter, choice in zip(LETTERS, wording.choices, strict=False)]


def parse_reply(wording: Wording, reply: str) -> Wording | None:
    """Parses a translated question from a reply with the same lines as the original.

    None unless the number of lines matches and each option is in its place, with its letter and some text: a lost,
    duplicated or moved option, an answer, or a remark before or after fails the reply.
    """
    lines = lines_of(reply)
    count = len(lines_of(wording.text))
    if len(lines) != count + sum(map(len, _options(wording))):
        return None
    text, choices = with_lines(wording.text, lines[:count]), []
    for letter, choice, option in zip(LETTERS, wording.choices, _options(wording), strict=False):
        found = _OPTION.fullmatch(lines[count])
        if found is None or unicodedata.normalize("NFKC", found[1]) != letter:
            return None
        choices.append(with_lines(choice, [found[2], *lines[count + 1 : count + len(option)]]))
        count += len(option)
    return Wording(text, tuple(choices))
