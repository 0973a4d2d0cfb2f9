"""Resolves a source of questions into parts, each a file or a split of a Hub dataset."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.safety import local_path
from calm_ray.questions.formats import Format, format_named, recognize
from calm_ray.questions.hub import HUB, hub_names
from calm_ray.questions.records import READERS, read_records

_NOT_DATA = {"dataset_info.json", "dataset_infos.json"}  # metadata next to data files
_WORD_END = re.compile(r"[^\w-]|_")
_TRANSLATION = re.compile(r"([a-z]{2})2([a-z]{2})")
_LOCALE = re.compile(r"[A-Za-z]{2}-[A-Z]{2}")  # the region is not a second language: FR-CA is not Catalan


@dataclass(frozen=True)
class Part:
    """One file or one split of a Hub dataset. Small and picklable: all that a task needs to read it."""

    name: str
    format: str | None
    """None if no row is readable."""
    language: str | None
    """None if its rows state theirs."""


def open_source(
    source: str, *, format: str | None = None, language: str | None = None, languages: Sequence[str] | None = None
) -> list[Part]:
    """Returns the parts of a source, sorted by name; reads only the first readable record of each.

    `source` is a file, a folder (the data files directly in it), a glob pattern (`**` allowed) or
    `hub:owner/name[:config[:split]]`; `{language}` in it expands to each of `languages`, in their order (for files, by
    default every language that calm_ray knows). `format` is a key of `FORMATS`, by default recognized by the records'
    fields. `language` applies to rows that do not state theirs; by default it is inferred from the file name, else from
    the two folders above. With `languages`, drops parts in other languages.

    Raises InputError if nothing is found, if formats are mixed, or if a language cannot be inferred.
    """
    given = None if language is None else _known(language, "language")
    parts: list[Part] = []
    names = _names(source, languages)
    shared = _shared_words(names)
    for name in names:
        layout = format_named(format) if format else _recognized(name)
        part_language = None
        if layout is not None and layout.language_field is None:
            part_language = given or _language_of(name, layout, shared)
        parts.append(Part(name, layout.name if layout else None, part_language))
    first = next((part for part in parts if part.format), None)
    for part in parts:
        if first and part.format and part.format != first.format:
            raise InputError(
                f"{source}: contains files of different formats: {first.name} is {first.format}, {part.name} is "
                f"{part.format}; name files of one format only"
            )
    wanted = [part for part in parts if languages is None or part.language is None or part.language in languages]
    if not wanted:
        raise InputError(f"{source}: contains no questions in {', '.join(languages or ())}")
    return wanted


def _known(name: str, where: str) -> str:
    code = language_code(name)
    if code is None:
        raise InputError(f"{where}: unknown language {name!r}; known languages: {', '.join(LANGUAGES)}")
    return code


def _names(source: str, languages: Sequence[str] | None) -> list[str]:
    if "{language}" in source:
        if source.startswith(HUB) and languages is None:
            raise InputError(f"{source}: {{language}} needs a list of languages here; write one language instead")
        found = [
            name for code in languages or LANGUAGES for name in matching(source.replace("{language}", code))
        ]  # fmt: skip
    else:
        found = matching(source)
    if not found:
        raise InputError(f"{source}: no question files found ({', '.join(READERS)})")
    return list(dict.fromkeys(found))


def matching(source: str) -> list[str]:
    """The data files that a file name, folder or pattern matches; a Hub dataset is returned as is."""
    if source.startswith(HUB):
        hub_names(source)
        return [source]
    path = local_path(source, "questions")
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{path}: unsupported suffix; supported are {', '.join(READERS)}")
        return [str(path)]
    # Path.glob rejects absolute patterns.
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
    return sorted(
        str(file) for file in found if file.is_file() and file.suffix in READERS and file.name not in _NOT_DATA
    )


def _recognized(name: str) -> Format | None:
    """The format of a part, from its first readable record; None if no record is readable."""
    is_empty = True
    for record in read_records(name):
        is_empty = False
        if isinstance(record.value, dict):
            return recognize(name, record.value)
    if is_empty:
        raise InputError(f"{name}: contains no rows")
    return None


def _shared_words(names: Sequence[str]) -> set[str]:
    """Words common to all file names, which identify no language, such as `it` in a model's name."""
    return set.intersection(*(set(_WORD_END.split(Path(name).stem)) for name in names)) if len(names) > 1 else set()


def _language_of(name: str, layout: Format, shared: set[str]) -> str:
    """The language named by the file name, else by the nearest folder."""
    if name.startswith(HUB):
        data_set, config, split = hub_names(name)
        names = [config or "", split or "", data_set.split("/")[1]]
    else:
        path = Path(name).absolute()
        names = [path.stem, path.parent.name, path.parent.parent.name]
        by_word = layout.path_languages
        found = [by_word[word] for word in map(str.lower, path.parts) if word in by_word]
        if found:
            return found[-1]
    for candidate in names:
        codes = _languages_in(candidate, shared) or _languages_in(candidate, set())
        if len(codes) > 1:
            raise InputError(f"{name}: {candidate!r} names the languages {' and '.join(codes)}; set `language`")
        if codes:
            return codes[0]
    raise InputError(
        f"{name}: neither its name nor its folder's names a known language; set `language`, or write {{language}} in "
        "its place in the path to take only files in known languages"
    )


def _languages_in(name: str, shared: set[str]) -> list[str]:
    """The languages in a name as separate words: `mmlu_FR-FR` fr, `x_csqa_cn_test` zh, `all_test_en2fr` fr."""
    codes: list[str | None] = []
    for word in _WORD_END.split(name):
        if word in shared:
            continue
        translation = _TRANSLATION.fullmatch(word)
        if translation and language_code(translation[1]):
            codes.append(language_code(translation[2]))
        elif _LOCALE.fullmatch(word):
            codes.append(language_code(word))
        else:
            codes += map(language_code, word.split("-"))
    return list(dict.fromkeys(code for code in codes if code))
