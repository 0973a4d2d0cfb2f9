"""`calm-ray recipes`: the recipes that come with calm_ray, a line each."""

from __future__ import annotations

import sys
from pathlib import Path

from calm_ray.recipes.files import find, name_of, shipped
from calm_ray.recipes.tables import TABLES, tables_of

WIDTH = 42
"""Of the column with the names."""


def list_recipes() -> None:
    """Prints every shipped recipe with the first sentence of its comment, and every table with its lists."""
    for path in shipped():
        if path.stem != TABLES:
            print(f"{name_of(path):{WIDTH}}{_first_sentence(path)}")
            continue
        for table in tables_of(path).values():
            lists, rows = ",".join(table.lists), len(list(table.rows()))
            name = f"{name_of(path)}:{table.name}" + (f"[{lists}]" if lists else "")
            print(f"{name:{WIDTH}}{table.layout.about}" + (f"; {rows} rows" if rows > 1 else ""))
    print("\n`calm-ray recipes NAME` prints a recipe, or a file of tables with the names that a row is chosen by.")


def print_recipe(word: str) -> None:
    """Prints the file of a recipe as it is. Raises InputError if there is none."""
    sys.stdout.write(find(word).read_text())


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = path.read_text().splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    sentence = " ".join(line.lstrip("# ") for line in lines[:end]).split(". ")[0]
    return sentence.rstrip(".")
