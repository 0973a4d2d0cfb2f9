"""Where questions come from: a source is resolved into parts, each a file or a split of a hub data set."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.safety import local_path
from calm_ray.questions.formats import Format, format_named, recognise
from calm_ray.questions.hub import HUB, hub_names
from calm_ray.questions.records import READERS, read_records

_NOT_DATA = {"dataset_info.json", "dataset_infos.json"}  # descriptions that lie beside data files
_WORD_END = re.compile(r"[^\w-]|_")
_TRANSLATION = re.compile(r"([a-z]{2})2([a-z]{2})")
_LOCALE = re.compile(r"[A-Za-z]{2}-[A-Z]{2}")  # a region is no second language: FR-CA is not Catalan


@dataclass(frozen=True)
class Part:
    """One file, or one split of a hub data set. Small and picklable: what a task needs to read it."""

    name: str
    format: str | None
    """None where not one row of it is readable."""
    language: str | None
    """None where its rows say it themselves."""


def open_source(
    source: str, *, format: str | None = None, language: str | None = None, languages: Sequence[str] | None = None
) -> list[Part]:
    """The parts of a source, in the order of their names; of each only the first record is read.

    `source` is a file, a folder (the data files directly in it), a pattern (`**` allowed) or
    `hub:owner/name[:config[:split]]`; `{language}` in it stands for each of `languages` (for files: by default every
    language that calm_ray knows). `format` is a name of `FORMATS`, by default recognised by the records' fields;
    `language` is that of rows that do not say theirs, by default read off the file's name, else off those of the two
    folders around it. With `languages`, parts that hold none of these are left out.

    Raises InputError where nothing is there, for parts of different formats, and where a language cannot be told.
    """
    fixed = None if language is None else _known(language, "language")
    parts: list[Part] = []
    names = _names(source, languages)
    shared = _shared_words(names)
    for name in names:
        layout = format_named(format) if format else _recognised(name)
        of_part = None
        if layout is not None and layout.language_field is None:
            of_part = fixed or _language_of(name, layout, shared)
        parts.append(Part(name, layout.name if layout else None, of_part))
    first = next((part for part in parts if part.format), None)
    for part in parts:
        if first and part.format and part.format != first.format:
            raise InputError(
                f"{source}: holds files of different formats: {first.name} is {first.format}, {part.name} is "
                f"{part.format}; name files of one format"
            )
    asked = [part for part in parts if languages is None or part.language is None or part.language in languages]
    if not asked:
        raise InputError(f"{source}: holds no question in {', '.join(languages or ())}")
    return asked


def _known(name: str, where: str) -> str:
    code = language_code(name)
    if code is None:
        raise InputError(f"{where}: {name!r} is no known language; known are {', '.join(LANGUAGES)}")
    return code


def _names(source: str, languages: Sequence[str] | None) -> list[str]:
    if "{language}" in source:
        if source.startswith(HUB) and languages is None:
            raise InputError(f"{source}: which languages? Write one instead of {{language}}")
        found = [
            name for code in languages or LANGUAGES for name in matching(source.replace("{language}", code))
        ]  # fmt: skip
    else:
        found = matching(source)
    if not found:
        raise InputError(f"{source}: there is no such file of questions ({', '.join(READERS)}), folder or pattern")
    return list(dict.fromkeys(found))


def matching(source: str) -> list[str]:
    """The data files of a file's name, folder or pattern; a hub data set as it is. Empty where nothing is there."""
    if source.startswith(HUB):
        hub_names(source)
        return [source]
    path = local_path(source, "questions")
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{path}: its suffix is none of {', '.join(READERS)}")
        return [str(path)]
    # Path.glob takes no absolute patterns.
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
    return sorted(
        str(file) for file in found if file.is_file() and file.suffix in READERS and file.name not in _NOT_DATA
    )


def _recognised(name: str) -> Format | None:
    """The format of a part by its first readable record."""
    is_empty = True
    for record in read_records(name):
        is_empty = False
        if isinstance(record.value, dict):
            return recognise(name, record.value)
    if is_empty:
        raise InputError(f"{name}: holds no rows")
    return None


def _shared_words(names: Sequence[str]) -> set[str]:
    """The words that all files' names have: they tell no languages apart, be it `it` of a model's name."""
    return set.intersection(*(set(_WORD_END.split(Path(name).stem)) for name in names)) if len(names) > 1 else set()


def _language_of(name: str, layout: Format, shared: set[str]) -> str:
    """The language that a part's name says: the file's own, else the nearest folder's."""
    if name.startswith(HUB):
        data_set, config, split = hub_names(name)
        names = [config or "", split or "", data_set.split("/")[1]]
    else:
        path = Path(name).absolute()
        names = [path.stem, path.parent.name, path.parent.parent.name]
        places = [layout.places[word] for word in map(str.lower, path.parts) if word in layout.places]
        if places:
            return places[-1]
    for one in names:
        codes = _languages_in(one, shared) or _languages_in(one, set())
        if len(codes) > 1:
            raise InputError(f"{name}: {one!r} names the languages {' and '.join(codes)}; say which with `language`")
        if codes:
            return codes[0]
    raise InputError(
        f"{name}: neither its name nor its folder's names a known language; say which with `language`, or write "
        "{language} for it in the path to take the known ones only"
    )


def _languages_in(name: str, shared: set[str]) -> list[str]:
    """The languages a name holds as words of their own: `mmlu_FR-FR` fr, `x_csqa_cn_test` zh, `all_test_en2fr` fr."""
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
