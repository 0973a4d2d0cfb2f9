"""What is compared: a configuration for each method, all made from one recipe.

A recipe may hold a section `compare`: what a method has otherwise than the recipe, as in a recipe.

    compare:
      sft_gold: {train: {learning_rate: 5e-7}}
      dpo_gold->dco: {rounds: 2}

The keys of `train` that methods have defaults of their own for (learning rate, epochs, beta, sft_weight and so on) are
meant for the recipe's own method. A method with other defaults does not take them from the recipe: it has its own, but
for what `compare` says. Everything else in the recipe holds for all methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from calm_ray.config import DEFAULT_METHOD, Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import WORLD, unknown_name
from calm_ray.methods import METHODS
from calm_ray.recipes import COMPARE, merge, override, read_recipe, validated
from calm_ray.run.directory import RunDirectory

BASE = "base"
"""The row of what all methods start from; no method, and no run."""
ARROW = "->"
TABLE_1 = [BASE, "sft_gold", "dpo_gold", "calm", f"dpo_gold{ARROW}dco", "dco"]
"""DCO, Table 1, with CALM before the rows of DCO."""

_OF_METHODS = {"sft_weight", *(key for method in METHODS.values() for key in method.train_defaults)}
"""The keys of `train` that methods have their own values for."""
_NAMED_BY_PLAN = ("name", "method", "init_from")
_THE_SAME = [
    "storage", "seed", "languages", "model", "device", "world", "questions", "sampling", "engines", "placement",
    "candidates", "train.lora",
]  # fmt: skip
"""What methods must share, to be compared at all, and to be served by the same engines."""


@dataclass(frozen=True)
class Contender:
    """A method and its run. `dpo_gold->dco` is DCO from where the run of `dpo_gold` ended."""

    method: str
    config: Config

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.storage, self.config.name)

    @property
    def starts_from_another(self) -> bool:
        return ARROW in self.method


@dataclass(frozen=True)
class Comparison:
    name: str
    """The recipe's."""
    methods: list[str]
    """The rows of the table, as they were asked for."""
    contenders: list[Contender]
    """All runs, each after the one that it starts from; the first starts from what all are compared with."""


def named_methods(words: Sequence[str]) -> list[str]:
    """The methods as they are written here, each once; `→` is `->`. Raises InputError for what is no method."""
    methods = [re.sub(r"\s*(?:→|->)\s*", ARROW, word) for word in words]
    for method in dict.fromkeys(methods):
        for part in method.split(ARROW) if method != BASE else ():
            if part.endswith("-"):
                raise InputError(f"--methods: {part} is not known; an arrow must stand in quotes: 'dpo_gold->dco'")
            if part not in METHODS:
                raise InputError(f"--methods: {unknown_name(part, [*([] if ARROW in method else [BASE]), *METHODS])}")
    return list(dict.fromkeys(methods))


def plan(recipe: Path, methods: Sequence[str], overrides: Sequence[str]) -> Comparison:
    """The runs of some methods (see `named_methods`), each after the one that it starts from, which is added.

    `key=value` in `overrides` is for all methods, `compare.METHOD.key=value` for one. Raises InputError for what cannot
    be compared.
    """
    recipes = _Recipes(recipe, overrides)
    chains = [method.split(ARROW) for method in methods if method != BASE]
    wanted = dict.fromkeys(ARROW.join(chain[:end]) for chain in chains for end in range(1, len(chain) + 1))
    if not wanted:
        raise InputError(f"--methods: name a method to compare with {BASE}")
    contenders = [Contender(method, recipes.config(method)) for method in wanted]
    first = contenders[0]
    for one in contenders:
        _check(one, first)
    return Comparison(first.config.name.removesuffix(_run_name("", first.method)), list(methods), contenders)


class _Recipes:
    """The recipe of each method."""

    def __init__(self, recipe: Path, overrides: Sequence[str]) -> None:
        self._path = recipe
        self._raw = read_recipe(recipe)
        own: dict[str, Any] = {COMPARE: {}}
        for word in overrides:
            if word.startswith(f"{COMPARE}."):
                override(own, word)
        self._for_all = [word for word in overrides if not word.startswith(f"{COMPARE}.")]
        self._by_method = self._read_section(self._raw.pop(COMPARE, {}))
        self._by_method_here = self._read_section(own[COMPARE])
        for word in self._for_all:
            if word.startswith("method="):
                raise InputError(f"{word!r}: the methods are what --methods names")

    def _read_section(self, section: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(section, dict) or not all(isinstance(keys, dict) for keys in section.values()):
            raise InputError(f"{self._path}: {COMPARE}: holds the keys of each method, like dco: {{rounds: 2}}")
        for method, keys in section.items():
            if unknown := [part for part in _arrows(method).split(ARROW) if part not in METHODS]:
                raise InputError(f"{self._path}: {COMPARE}: {unknown_name(unknown[0], list(METHODS))}")
            if taken := [key for key in _NAMED_BY_PLAN if key in keys]:
                raise InputError(f"{self._path}: {COMPARE}.{method}.{taken[0]}: follows from the method and the recipe")
        return {_arrows(method): keys for method, keys in section.items()}

    def config(self, method: str) -> Config:
        raw = deepcopy(self._raw)
        before, _, last = method.rpartition(ARROW)
        train = raw.get("train")
        if not _trains_alike(last, str(raw.get("method", DEFAULT_METHOD))) and isinstance(train, dict):
            raw |= {"train": {key: value for key, value in train.items() if key not in _OF_METHODS}}
        merge(raw, deepcopy(self._by_method.get(method, {})))
        for word in self._for_all:
            override(raw, word)
        merge(raw, deepcopy(self._by_method_here.get(method, {})))
        if raw.get("candidates") is None:
            raise InputError(
                f"{self._path}: candidates: is missing; policies are compared by how they rank the same candidates, "
                "for instance candidates: {form: letters}"
            )
        if before:
            raw["init_from"] = _run_name(raw.get("name", ""), before)
        if "name" in raw:
            raw["name"] = _run_name(raw["name"], method)
        raw["method"] = last
        return validated(raw, f"{self._path}, method {method},")


def _trains_alike(first: str, second: str) -> bool:
    """Whether two methods have the same defaults of training, so that a recipe's values are meant for both."""
    return all(name in METHODS for name in (first, second)) and (
        METHODS[first].train_defaults == METHODS[second].train_defaults
    )


def _arrows(method: Any) -> str:
    return str(method).replace("→", ARROW)


def _run_name(name: str, method: str) -> str:
    return f"{name}-{method.replace(ARROW, '-')}"


def _check(one: Contender, first: Contender) -> None:
    """Raises InputError where a method cannot stand beside the first one."""
    config = one.config
    for key in _THE_SAME:
        if attrgetter(key)(config) != attrgetter(key)(first.config):
            raise InputError(f"{COMPARE}: {key} must be the same for all methods; {one.method} has another one")
    if config.rounds == 0:
        raise InputError(f"rounds: is 0 for {one.method}; a method that is compared needs one or more")
    if config.model != WORLD and not config.questions.evaluate and not config.questions.split:
        raise InputError("questions.evaluate: methods are compared on held-out questions; name some, or set split")
