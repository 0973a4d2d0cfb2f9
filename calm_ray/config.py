"""The typed configuration of a run.

A recipe is a YAML file with the keys of `RunSettings` and `Config`, plus a section per method; `section.key=value`
overrides one key. Unknown keys are rejected with the nearest known name, wrong types with the expected one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, create_model, model_validator

from calm_ray.core.safety import refuse_secrets
from calm_ray.core.sections import Section
from calm_ray.core.settings import RunSettings
from calm_ray.methods import METHODS
from calm_ray.methods.base import Evaluation, Method, Step
from calm_ray.methods.plugins import load_method, package_fingerprint
from calm_ray.run.invalidation import Graph

if TYPE_CHECKING:
    from calm_ray.methods.shared.train import Train
    from calm_ray.training.objectives import Objective

DEFAULT_METHOD = "calm"


class Config(RunSettings):
    """Configuration of one run. Use `parse_config`, which adds the sections of the methods."""

    of_method: ClassVar[Method[Any]]

    method: str = DEFAULT_METHOD
    """`calm`: DPO on pairs from a vote across languages. `sft`: its baseline, supervised training on the chosen side.
    `dco`: fits margins between candidates to those of the other languages. `dpo_gold` and `sft_gold` are `calm` and
    `sft` restricted to pairs whose chosen answer is correct (CALM, Table 2) or, with `candidates`, trained on the
    correct candidate and another one (DCO, section 6.1). `dco_gold` is `dco` fitted to the correct candidate. No other
    built-in method trains on gold answers. `package.module:NAME` selects a custom method."""
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]] = []
    """Packages whose code the recipe may run, for custom methods."""

    @model_validator(mode="before")
    @classmethod
    def _apply_method_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if isinstance(raw.get("plugins"), dict):  # from a run's config.json, with an identity per package
            raw = {**raw, "plugins": list(raw["plugins"])}
        return _over_defaults(cls.of_method.defaults(raw), raw)

    @model_validator(mode="before")
    @classmethod
    def _reject_credentials(cls, raw: Any) -> Any:
        """Runs first, so that no other error message can repeat a secret."""
        refuse_secrets(raw)
        return raw

    @model_validator(mode="after")
    def _check_method(self) -> Config:
        self.of_method.check(self, self.own)
        if self.train.engine == "trl" and self.objective.for_trl() is None:
            raise ValueError(f"train.engine: trl does not support method: {self.method}; use fsdp")
        for package in self.plugins:
            package_fingerprint(package)
        return self

    @property
    def own(self) -> Any:
        """The section of the run's method."""
        return getattr(self, self.of_method.section)

    @property
    def steps(self) -> tuple[Step, ...]:
        """From questions to training examples."""
        return self.of_method.steps(self, self.own)

    @property
    def evaluation(self) -> Evaluation:
        """The steps that evaluate each policy."""
        return self.of_method.evaluation(self, self.own)

    @property
    def objective(self) -> Objective:
        """The training objective."""
        return self.of_method.objective(self, self.own)

    @property
    def training(self) -> Train:
        """The training step."""
        from calm_ray.methods.shared.train import Train

        return Train(self, self.objective, self.steps[-1])

    @property
    def graph(self) -> Graph:
        """All steps of a round and their dependencies."""
        return Graph((*self.steps, self.training), self.evaluation, self.of_method.section)

    @property
    def needs_gold(self) -> bool:
        """Whether the training questions need gold answers."""
        return self.of_method.needs_gold(self.own)

    @property
    def writes(self) -> bool:
        """Whether any step generates completions, for training or evaluation."""
        return any(step.writes for step in (*self.steps, *self.evaluation))

    @property
    def notice(self) -> str | None:
        """A notice to print when the run starts."""
        return self.of_method.notice(self, self.own)

    def as_record(self) -> dict[str, Any]:
        """Contents of a run's config.json: every key, and the identity of each plugin's code."""
        return {**self.model_dump(mode="json"), "plugins": {name: package_fingerprint(name) for name in self.plugins}}


def _over_defaults(defaults: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Merges a recipe over its method's defaults, section by section; a section may be empty."""
    merged = dict(raw)
    for name, section in defaults.items():
        given = raw.get(name)
        if given is None or isinstance(given, Mapping):
            merged[name] = {**section, **(given or {})}
    return merged


def parse_config(raw: Any, allowed: Sequence[str] | None = None) -> Config:
    """Validates a recipe's keys and values. Raises ValueError, including pydantic's ValidationError.

    `allowed` lists the packages whose code may run; None means those in the recipe's `plugins`.
    """
    return config_class(raw, allowed).model_validate(raw)


def config_class(raw: Any, allowed: Sequence[str] | None = None) -> type[Config]:
    """The Config class of a recipe's method. Raises ValueError for an unknown or disallowed method."""
    named: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    if allowed is None:
        plugins = named.get("plugins")
        allowed = [str(name) for name in plugins] if isinstance(plugins, list | dict) else []
    return _class_of(str(named.get("method", DEFAULT_METHOD)), tuple(allowed))


@lru_cache
def _class_of(name: str, allowed: Sequence[str]) -> type[Config]:
    """Config with the sections of all built-in methods, as a recipe may serve several, and of the method itself."""
    own = load_method(name, allowed)
    settings: dict[str, type[Section]] = {each.section: each.settings for each in METHODS.values()}
    if settings.setdefault(own.section, own.settings) is not own.settings or own.section in Config.model_fields:
        raise ValueError(f"method: {name} names its section {own.section}, which is already taken")
    sections: dict[str, Any] = {
        section: (kind, ... if any(field.is_required() for field in kind.model_fields.values()) else kind())
        for section, kind in settings.items()
    }
    made = create_model("Config", __base__=Config, __doc__=Config.__doc__, **sections)
    made.of_method = own
    return made
