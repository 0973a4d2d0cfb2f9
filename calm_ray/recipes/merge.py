"""Merging recipes: sections key by key, later over earlier; any other value is replaced.

`extends: OTHER`, or a list of recipes, names those that a recipe is merged over: paths relative to its own folder, or
names of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from calm_ray.core import safe_yaml
from calm_ray.core.errors import InputError
from calm_ray.core.safety import redact
from calm_ray.recipes.files import find, read_yaml, reason

MAX_FILES = 100
"""Recipes that one recipe may extend, directly or indirectly."""
MAX_VALUE_LENGTH = 200
"""Characters of a wrong value that a message repeats."""


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe merged over those it extends, not validated yet. Raises InputError."""
    return _Reader(path).read(path, ())


def read_part(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Keys and values that are written in the file `path`, merged over the recipes that they extend."""
    return _Reader(path).resolve(dict(raw), path, ())


class _Reader:
    """Reads one recipe and all that it extends, and counts them."""

    def __init__(self, first: Path) -> None:
        self._first, self._count = first, 0

    def read(self, path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
        """`children` are the recipes that led here."""
        if path.resolve() in children:
            raise InputError(f"{path}: extends itself by way of {children[-1]}")
        self._count += 1
        if self._count > MAX_FILES:
            raise InputError(f"{self._first}: extends more than {MAX_FILES} recipes, by way of {path}")
        return self.resolve(read_yaml(path), path, children)

    def resolve(self, raw: dict[str, Any], path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
        extended = raw.pop("extends", [])
        parents = [extended] if isinstance(extended, str) else extended
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            raise InputError(f"{path}: extends: name a recipe or a list of recipes (it is {shown(extended)})")
        return merged(*(self.read(find(each, path.parent), (*children, path.resolve())) for each in parents), raw)


def merged(*recipes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipes as one, later over earlier."""
    result: dict[str, Any] = {}
    for recipe in recipes:
        merge(result, recipe)
    return result


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Puts the keys of `above` over those of `below`, section by section, in place."""
    for key, value in above.items():
        if isinstance(value, dict):
            section = below[key] if isinstance(below.get(key), dict) else {}
            below[key] = merged(section, value)
        else:
            below[key] = value


def override(raw: dict[str, Any], word: str) -> None:
    """Sets the key of `section.key=value`. Raises InputError."""
    key, equals, value = word.partition("=")
    *sections, last = key.split(".")
    if not equals or not all([*sections, last]) or len(sections) >= safe_yaml.MAX_DEPTH:
        raise InputError(f"{shown(word)}: an override looks like section.key=value")
    section = raw
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise InputError(f"{shown(key)}: {name} is a value, not a section")
    try:
        section[last] = safe_yaml.load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{shown(key)}: the value cannot be read as YAML: {reason(error)}") from None


def is_override(word: str) -> bool:
    """Whether a word of the command line is `section.key=value`; a path may contain a `=` too."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The recipes and the overrides among the words of a command line."""
    found = list(words)
    return [word for word in found if not is_override(word)], [word for word in found if is_override(word)]


def shown(value: Any) -> str:
    """A value as a message repeats it: shortened, without credentials."""
    text = redact(repr(value))
    return text if len(text) <= MAX_VALUE_LENGTH else text[:MAX_VALUE_LENGTH] + "..."
