"""The contenders of a comparison: one configuration per method, all from the same recipe.

The optional section `compare` of a recipe overrides its keys per method:

    compare:
      sft_gold: {train: {learning_rate: 5e-7}}
      dpo_gold->dco: {rounds: 2}

Keys of `train` with method-specific defaults (learning rate, epochs, beta, sft_weight and so on) apply only to the
recipe's own method and to methods with the same defaults; other methods use their defaults unless `compare` overrides
them. Everything else in the recipe applies to all methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

from calm_ray.config import DEFAULT_METHOD, Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import DEMOS, unknown_name
from calm_ray.methods import METHODS
from calm_ray.recipes.load import COMPARE, Recipes, read_recipes, source_of, validated
from calm_ray.recipes.merge import merge, override
from calm_ray.run.directory import RunDirectory

BASE = "base"
"""The table row of the policy that all methods start from; not a method or run."""
ARROW = "->"
TABLE_1 = [BASE, "sft_gold", "dpo_gold", "calm", f"dpo_gold{ARROW}dco", "dco"]
"""The rows of DCO's Table 1, with CALM added before those of DCO."""

_METHOD_KEYS = {"sft_weight", *(key for method in METHODS.values() for key in method.train_defaults)}
"""Keys of `train` with method-specific defaults."""
_SET_BY_PLAN = ("name", "method", "init_from")
_SHARED_KEYS = [
    "storage", "seed", "languages", "model", "device", "world", "questions", "sampling", "engines", "placement",
    "candidates", "train.lora",
]  # fmt: skip
"""Must be equal for all methods, so that they are comparable and can use the same engines."""


@dataclass(frozen=True)
class Contender:
    """A method and its run. `dpo_gold->dco` is DCO starting from the final policy of the `dpo_gold` run."""

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
    """The recipe's name."""
    methods: list[str]
    """The table's rows, in the requested order."""
    contenders: list[Contender]
    """All runs, each after the one it starts from; the first one starts from the base policy."""


def named_methods(words: Sequence[str]) -> list[str]:
    """Normalizes arrows to `->` and removes duplicates. Raises InputError for unknown methods."""
    methods = [re.sub(r"\s*(?:→|->)\s*", ARROW, word) for word in words]
    for method in dict.fromkeys(methods):
        for part in method.split(ARROW) if method != BASE else ():
            if part.endswith("-"):
                raise InputError(f"--methods: {part} is not known; quote the arrow: 'dpo_gold->dco'")
            if part not in METHODS:
                raise InputError(f"--methods: {unknown_name(part, [*([] if ARROW in method else [BASE]), *METHODS])}")
    return list(dict.fromkeys(methods))


def plan(recipes: Recipes, methods: Sequence[str], overrides: Sequence[str]) -> Comparison:
    """Plans the runs of `methods` (see `named_methods`), adding the runs that they start from.

    In `overrides`, `key=value` applies to all methods, `compare.METHOD.key=value` to one. Raises InputError if the
    methods cannot be compared.
    """
    by_method = _RecipesByMethod(recipes, overrides)
    chains = [method.split(ARROW) for method in methods if method != BASE]
    wanted = dict.fromkeys(ARROW.join(chain[:end]) for chain in chains for end in range(1, len(chain) + 1))
    if not wanted:
        raise InputError(f"--methods: name a method to compare with {BASE}")
    contenders = [Contender(method, by_method.config(method)) for method in wanted]
    first = contenders[0]
    for one in contenders:
        _check(one, first)
    return Comparison(first.config.name.removesuffix(_run_name("", first.method)), list(methods), contenders)


class _RecipesByMethod:
    """Builds each method's configuration."""

    def __init__(self, recipes: Recipes, overrides: Sequence[str]) -> None:
        self._source = source_of(recipes)
        self._raw = read_recipes(recipes)
        own: dict[str, Any] = {COMPARE: {}}
        for word in overrides:
            if word.startswith(f"{COMPARE}."):
                override(own, word)
        self._for_all = [word for word in overrides if not word.startswith(f"{COMPARE}.")]
        self._from_recipe = self._read_section(self._raw.pop(COMPARE, {}))
        self._from_command_line = self._read_section(own[COMPARE])
        for word in self._for_all:
            if word.startswith("method="):
                raise InputError(f"{word!r}: set methods with --methods")

    def _read_section(self, section: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(section, dict) or not all(isinstance(keys, dict) for keys in section.values()):
            raise InputError(f"{self._source}: {COMPARE}: must map methods to keys, such as dco: {{rounds: 2}}")
        for method, keys in section.items():
            if unknown := [part for part in _normalize_arrow(method).split(ARROW) if part not in METHODS]:
                raise InputError(f"{self._source}: {COMPARE}: {unknown_name(unknown[0], list(METHODS))}")
            if taken := [key for key in _SET_BY_PLAN if key in keys]:
                raise InputError(f"{self._source}: {COMPARE}.{method}.{taken[0]}: cannot be set per method")
        return {_normalize_arrow(method): keys for method, keys in section.items()}

    def config(self, method: str) -> Config:
        raw = deepcopy(self._raw)
        before, _, last = method.rpartition(ARROW)
        train = raw.get("train")
        if not _same_train_defaults(last, str(raw.get("method", DEFAULT_METHOD))) and isinstance(train, dict):
            raw |= {"train": {key: value for key, value in train.items() if key not in _METHOD_KEYS}}
        merge(raw, deepcopy(self._from_recipe.get(method, {})))
        for word in self._for_all:
            override(raw, word)
        merge(raw, deepcopy(self._from_command_line.get(method, {})))
        if raw.get("candidates") is None:
            raise InputError(
                f"{self._source}: candidates: is missing; policies are compared by how they rank candidates, "
                "for example candidates: {form: letters}"
            )
        if before:
            raw["init_from"] = _run_name(raw.get("name", ""), before)
        if "name" in raw:
            raw["name"] = _run_name(raw["name"], method)
        raw["method"] = last
        return validated(raw, f"{self._source}, method {method},")


def _same_train_defaults(first: str, second: str) -> bool:
    """Whether two methods have the same training defaults, so that a recipe's values apply to both."""
    return all(name in METHODS for name in (first, second)) and (
        METHODS[first].train_defaults == METHODS[second].train_defaults
    )


def _normalize_arrow(method: Any) -> str:
    return str(method).replace("→", ARROW)


def _run_name(name: str, method: str) -> str:
    return f"{name}-{method.replace(ARROW, '-')}"


def _check(one: Contender, first: Contender) -> None:
    """Raises InputError if a method cannot be compared with the first one."""
    config = one.config
    for key in _SHARED_KEYS:
        if attrgetter(key)(config) != attrgetter(key)(first.config):
            raise InputError(f"{COMPARE}: {key} must be the same for all methods, but {one.method} differs")
    if config.rounds == 0:
        raise InputError(f"rounds: is 0 for {one.method}; a comparison needs at least 1")
    if config.model not in DEMOS and not config.questions.evaluate and not config.questions.split:
        raise InputError("questions.evaluate: methods are compared on held-out questions; set this or questions.split")
