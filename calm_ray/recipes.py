"""Recipes: YAML files that say what a run is, from the keys of `calm_ray.config.Config`.

A recipe may begin with `extends: OTHER.yaml`, or a list of them, paths from its own folder: it then says only what
differs. Sections are merged key by key, later files over earlier ones, the recipe itself over all; anything else
(numbers, texts, lists, null) is replaced. On top come `section.key=value` overrides.

A recipe's section `compare` is for `jobs/compare.py` (see `calm_ray.comparison.contenders`); a single run ignores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from calm_ray.config import Config, config_class
from calm_ray.core import safe_yaml
from calm_ray.core.errors import InputError
from calm_ray.core.safety import local_path, redact
from calm_ray.core.sections import unknown_name
from calm_ray.methods.calm.settings import Preferences

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"
DEMO_RECIPE = RECIPES / "demo.yaml"
COMPARE = "compare"
"""The section that says what differs between methods that are compared."""
MOST_FILES = 100
"""Recipes that one recipe extends, and those that these extend."""
LONGEST_VALUE = 200
"""Characters of a wrong value that a message repeats."""


def load_config(recipe: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration of a recipe (the demo's, if None) with `section.key=value` overrides.

    Raises InputError, in one message that names every wrong field and what to do.
    """
    path = Path(recipe) if recipe is not None else DEMO_RECIPE
    raw = read_recipe(path)
    raw.pop(COMPARE, None)
    for word in overrides or []:
        override(raw, word)
    return validated(raw, str(path))


def is_override(word: str) -> bool:
    """Whether a word of a command is `section.key=value`; a path may have a `=` in it too."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key


def recipe_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The words of a command, apart: a recipe, or None, and overrides. Raises InputError for two recipes."""
    recipes = [word for word in words if not is_override(word)]
    if len(recipes) > 1:
        raise InputError(f"one recipe at a time, not {' and '.join(recipes)}; an override looks like section.key=value")
    return recipes[0] if recipes else None, [word for word in words if is_override(word)]


def validated(raw: Mapping[str, Any], source: str, allowed: Sequence[str] | None = None) -> Config:
    """The configuration that keys and values make; `source` is where they are from, for what InputError says.

    `allowed` as in `calm_ray.config.parse_config`.
    """
    lines: list[str]
    try:
        kind = config_class(raw, allowed)
    except ValueError as error:
        lines = [redact(str(error))]
    else:
        try:
            return kind.model_validate(raw)
        except ValidationError as error:
            lines = _explain(error, kind)
    raise InputError(f"{source} is not a valid recipe:\n" + "\n".join(f"  {line}" for line in lines))


def load_preferences(preset: str, overrides: list[str]) -> Preferences:
    """The section `preferences` by itself: a preset with `key=value` overrides. Raises InputError."""
    raw: dict[str, Any] = {"preset": preset}
    for word in overrides:
        override(raw, word)
    if raw.get("winner") == "gold":
        raise InputError("winner: gold answers choose pairs only in a run with method: dpo_gold or sft_gold")
    try:
        return Preferences.model_validate(raw)
    except ValidationError as error:
        raise InputError("preferences: " + "; ".join(_explain(error, Preferences))) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe merged over those it extends, not validated yet."""
    return _read_merged(path, (), [])


def _read_merged(path: Path, children: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """`children` are the recipes that led here, `read` all that were read so far."""
    raw = _read_yaml(path)
    if path.resolve() in children:
        raise InputError(f"{path}: extends itself, by way of {children[-1]}")
    read.append(path)
    if len(read) > MOST_FILES:
        raise InputError(f"{read[0]}: extends more than {MOST_FILES} recipes, by way of {path}")
    extended = raw.pop("extends", [])
    parents = [extended] if isinstance(extended, str) else extended
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise InputError(f"{path}: extends: name a recipe or a list of recipes (it is {_shown(extended)})")
    merged: dict[str, Any] = {}
    for parent in parents:
        merge(merged, _read_merged(path.parent / parent, (*children, path.resolve()), read))
    merge(merged, raw)
    return merged


def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Puts one recipe's keys over another's, section by section."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    found = local_path(str(path), "recipe")
    if not found.is_file():
        raise InputError(
            f"{path}: there is no such recipe; the ones that come with calm_ray are in {DEMO_RECIPE.parent}"
        )
    try:
        with open(found, "rb") as file:
            raw = safe_yaml.load(file.read(safe_yaml.LARGEST + 1).decode())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as YAML: {_said(error)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return raw


def override(raw: dict[str, Any], word: str) -> None:
    """Sets the key of `section.key=value`. Raises InputError."""
    key, equals, value = word.partition("=")
    *sections, last = key.split(".")
    if not equals or not all([*sections, last]) or len(sections) >= safe_yaml.DEEPEST:
        raise InputError(f"{_shown(word)}: an override looks like section.key=value")
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise InputError(f"{_shown(key)}: {section} is a value, not a section")
    try:
        place[last] = safe_yaml.load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{_shown(key)}: the value is not readable as YAML: {_said(error)}") from None


def _said(error: Exception) -> str:
    """What an error says, without the lines of the file that PyYAML quotes: it may be the wrong file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        said = " ".join(part for part in (error.context, error.problem) if part)
        return redact(f"line {error.problem_mark.line + 1}: {said}")
    return redact(str(error).splitlines()[0])


def _shown(value: Any) -> str:
    """A value as a message repeats it."""
    shown = redact(repr(value))
    return shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + "..."


def _explain(error: ValidationError, of: type[BaseModel]) -> list[str]:
    lines = []
    for item in error.errors():
        # pydantic adds the kinds of a union to the place, as in dco.gamma.constrained-float.
        where = ".".join(str(part) for part in item["loc"] if not re.search(r"constrained|\[", str(part)))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            other = "".join(f"; there is {place}" for place in _places_of(key, of))
            lines.append(f"{where}: {unknown_name(key, _keys_beside(item['loc'], of))}{other}")
        elif item["type"] == "missing":
            lines.append(f"{where}: is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f" (it is {_shown(item['input'])})"
            lines.append(f"{where}: {message}{given}" if where else message)
    return list(dict.fromkeys(lines))


def _places_of(key: str, config: type[BaseModel]) -> list[str]:
    """The sections' keys of that name."""
    sections = {name: _section_in(field.annotation) for name, field in config.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _keys_beside(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    """The keys of the section that holds the last part of an error's location."""
    for part in location[:-1]:
        below = _section_in(section.model_fields[str(part)].annotation)
        assert below is not None
        section = below
    return list(section.model_fields)
