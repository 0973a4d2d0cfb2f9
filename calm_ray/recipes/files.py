"""Where recipes are: a name such as `dco/base` stands for a file of this package, anything else is a path."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from calm_ray.core import safe_yaml
from calm_ray.core.errors import InputError
from calm_ray.core.safety import local_path, redact

RECIPES = Path(__file__).parent
DEMO_RECIPE = RECIPES / "demo.yaml"
SUFFIX = ".yaml"


def shipped() -> list[Path]:
    """The files that come with calm_ray."""
    return sorted(RECIPES.rglob(f"*{SUFFIX}"), key=lambda path: (len(path.relative_to(RECIPES).parts), path))


def name_of(path: Path) -> str:
    """The name of a shipped recipe: its path in this package without the suffix."""
    return path.relative_to(RECIPES).as_posix().removesuffix(SUFFIX)


def find(word: str, folder: Path | None = None) -> Path:
    """The file that a word of the command line or of `extends` names. Raises InputError if there is none.

    Tried in this order: the path itself, relative to `folder`; the same with `.yaml`; a recipe of this package.
    """
    path = local_path(str((folder or Path()) / word), "recipe")
    for found in (path, Path(f"{path}{SUFFIX}"), RECIPES / f"{word}{SUFFIX}"):
        if found.is_file():
            return found
    near = difflib.get_close_matches(word, [name_of(each) for each in shipped()], n=1)
    hint = f"did you mean {near[0]}?" if near else "`calm-ray recipes` lists those that come with calm_ray"
    raise InputError(f"{path}: there is no such recipe; {hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises InputError if it is not a mapping in plain YAML."""
    try:
        with open(path, "rb") as file:
            raw = safe_yaml.load(file.read(safe_yaml.LARGEST + 1).decode())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {reason(error)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return raw


def reason(error: Exception) -> str:
    """The message of an error, without the lines of the file that PyYAML quotes: it may be the wrong file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        said = " ".join(part for part in (error.context, error.problem) if part)
        return redact(f"line {error.problem_mark.line + 1}: {said}")
    return redact(str(error).splitlines()[0])
