"""The tables of a paper as one file: a table is a product of lists, and a row of it is a recipe.

    table1:
      about: MMMLU in twelve languages at once
      with: [base, mmmlu, joint]
      model: [aya, qwen3]
      method: [dco, calm]

`dco/tables:table1[aya,calm]` merges base, mmmlu, joint, aya and calm, in this order, and names the run
`dco-table1-aya-calm`, after the file's folder. Each name is an entry of the file's section `parts`, or else a recipe. A
table may also hold `set`, keys and values for every row, and `but`, keys and values for the rows with a certain choice.
`{model}` in a value stands for the row's choice; a choice that only fills such a place needs no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from calm_ray.core.errors import InputError
from calm_ray.core.sections import unknown_name
from calm_ray.recipes.files import find, read_yaml
from calm_ray.recipes.merge import merged, read_part, read_recipe

ROW = re.compile(r"(?P<file>.+):(?P<table>[\w.-]+)(\[(?P<choices>[^\[\]]*)\])?")
TABLES = "tables"
"""The name of a file of tables, without its suffix."""
PARTS = "parts"
Keys = dict[str, Any]


class Layout(BaseModel):
    """What a file says of one table. Every key that is not a field is a list to choose from."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, list[str]]

    about: str = ""
    below: list[str] = Field(default=[], alias="with")
    set: Keys = {}
    but: dict[str, Keys] = {}


@dataclass(frozen=True)
class Table:
    """One table of a file."""

    path: Path
    name: str
    layout: Layout
    parts: Mapping[str, Keys | None]

    @property
    def lists(self) -> dict[str, list[str]]:
        """What may be chosen, by the name of the list."""
        return self.layout.__pydantic_extra__

    def rows(self) -> Iterator[str]:
        """Every row, as it follows the colon on a command line."""
        for choices in product(*self.lists.values()):
            yield f"{self.name}[{','.join(choices)}]" if choices else self.name

    def recipe(self, choices: list[str]) -> Keys:
        """The recipe of the row with these choices, one of each list. Raises InputError for any others."""
        if len(choices) != len(self.lists):
            wanted = ", ".join(f"{name} ({', '.join(entries)})" for name, entries in self.lists.items())
            raise InputError(f"{self.path}:{self.name}: choose one of each, such as {next(self.rows())}: {wanted}")
        chosen = dict(zip(self.lists, choices, strict=True))
        for name, choice in chosen.items():
            if choice not in self.lists[name]:
                raise InputError(f"{self.path}:{self.name}: {name}: {unknown_name(choice, self.lists[name])}")
        pieces = [self._piece(name) for name in [*self.layout.below, *self._named_choices(chosen)]]
        name = "-".join([self.path.resolve().parent.name, self.name, *choices])
        pieces += [{"name": name}, self.layout.set]
        pieces += [keys for choice, keys in self.layout.but.items() if choice in choices]
        return merged(*(_filled(piece, chosen) for piece in pieces))

    def _named_choices(self, chosen: Mapping[str, str]) -> list[str]:
        """The choices that name a part or a recipe; the others only fill a `{list}` of `set`."""
        filled = str(self.layout.set)
        return [choice for name, choice in chosen.items() if choice in self.parts or f"{{{name}}}" not in filled]

    def _piece(self, name: str) -> Keys:
        if name in self.parts:
            return read_part(self.parts[name] or {}, self.path)
        return read_recipe(find(name, self.path.parent))


def _filled(value: Any, chosen: Mapping[str, str]) -> Any:
    """The value with `{list}` replaced by the choice of that list in every text."""
    if isinstance(value, dict):
        return {key: _filled(each, chosen) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, chosen) for each in value]
    if isinstance(value, str):
        for name, choice in chosen.items():
            value = value.replace(f"{{{name}}}", choice)
    return value


def tables_of(path: Path) -> dict[str, Table]:
    """The tables of a file. Raises InputError if it is not a file of tables."""
    raw = read_yaml(path)
    try:
        parts = TypeAdapter(dict[str, Keys | None]).validate_python(raw.pop(PARTS, {}))
        layouts = TypeAdapter(dict[str, Layout]).validate_python(raw)
    except ValidationError as error:
        where, what = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise InputError(f"{path} is not a file of tables: {where}: {what}") from None
    return {name: Table(path, name, layout, parts) for name, layout in layouts.items()}


def read_row(word: str) -> dict[str, Any] | None:
    """The recipe of `FILE:TABLE[CHOICE,CHOICE]`; None if the word is not written like that. Raises InputError."""
    found = ROW.fullmatch(word)
    if found is None:
        return None
    path = find(found["file"])
    tables = tables_of(path)
    if found["table"] not in tables:
        raise InputError(f"{path}: table {unknown_name(found['table'], list(tables))}")
    choices = [choice.strip() for choice in (found["choices"] or "").split(",")] if found["choices"] else []
    return tables[found["table"]].recipe(choices)
