"""From recipes and overrides to a validated configuration, or one message that names every mistake.

The section `compare` is for `jobs/compare.py` (see `calm_ray.comparison.contenders`); a single run ignores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from calm_ray.config import Config, config_class
from calm_ray.core.errors import InputError
from calm_ray.core.safety import redact
from calm_ray.core.sections import unknown_name
from calm_ray.methods.calm.settings import Preferences
from calm_ray.recipes.files import DEMO_RECIPE, find
from calm_ray.recipes.merge import merged, override, read_recipe, shown
from calm_ray.recipes.tables import TABLES, read_row, tables_of

COMPARE = "compare"
"""The section that says what differs between methods that are compared."""

Recipes = str | Path | Sequence[str | Path] | None
"""Recipes to merge left to right: paths, names such as `dco/base`, or rows of tables; None for the demo."""


def load_config(recipes: Recipes = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of merged recipes with `section.key=value` overrides.

    Raises InputError, in one message that names every wrong field and what to do.
    """
    raw = read_recipes(recipes)
    raw.pop(COMPARE, None)
    for word in overrides:
        override(raw, word)
    return validated(raw, source_of(recipes))


def read_recipes(recipes: Recipes) -> dict[str, Any]:
    """The recipes merged left to right, not validated yet. Raises InputError."""
    return merged(*(_read(word) for word in _words(recipes)))


def source_of(recipes: Recipes) -> str:
    """The recipes as a message names them."""
    return " + ".join(_words(recipes))


def _words(recipes: Recipes) -> list[str]:
    if recipes is None or isinstance(recipes, str | Path):
        return [str(recipes or DEMO_RECIPE)]
    return [str(word) for word in recipes] or [str(DEMO_RECIPE)]


def _read(word: str) -> dict[str, Any]:
    row = None if Path(word).is_file() else read_row(word)
    if row is not None:
        return row
    path = find(word)
    if path.stem == TABLES:
        rows = ", ".join(f"{word}:{next(table.rows())}" for table in tables_of(path).values())
        raise InputError(f"{path}: choose a row of a table, such as {rows}")
    return read_recipe(path)


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


def _explain(error: ValidationError, of: type[BaseModel]) -> list[str]:
    lines = []
    for item in error.errors():
        # pydantic adds the kinds of a union to the place, as in dco.gamma.constrained-float.
        where = ".".join(str(part) for part in item["loc"] if not re.search(r"constrained|\[", str(part)))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            other = "".join(f"; there is {field}" for field in _sections_with(key, of))
            lines.append(f"{where}: {unknown_name(key, _keys_beside(item['loc'], of))}{other}")
        elif item["type"] == "missing":
            lines.append(f"{where}: is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f" (it is {shown(item['input'])})"
            lines.append(f"{where}: {message}{given}" if where else message)
    return list(dict.fromkeys(lines))


def _sections_with(key: str, config: type[BaseModel]) -> list[str]:
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
