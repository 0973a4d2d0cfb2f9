"""The typed configuration of a run: what a recipe may say.

A recipe is a YAML file with the keys of `RunSettings` and `Config`, and a section for each method's own settings;
`section.key=value` overrides a key of it. Unknown keys and wrong types are refused with the nearest known name.
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
from calm_ray.methods.plugins import identity_of, method_named
from calm_ray.run.invalidation import Graph

if TYPE_CHECKING:
    from calm_ray.methods.shared.train import Train
    from calm_ray.training.objectives import Objective

DEFAULT_METHOD = "calm"


class Config(RunSettings):
    """One run. Made by `parse_config`, which adds the sections of the methods."""

    of_method: ClassVar[Method[Any]]

    method: str = DEFAULT_METHOD
    """CALM: DPO on the pairs of a vote; `sft`, its baseline: supervised training on their chosen side. DCO: margins
    between candidates, fitted to those of the other languages. `dpo_gold` and `sft_gold`, the only methods that train
    with gold answers: the same as CALM and SFT, on those pairs alone whose chosen side is right (CALM, Table 2); or,
    with `candidates`, on the right candidate and another one (DCO, section 6.1). Or a method of your own, as
    `package.module:NAME`."""
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]] = []
    """Packages whose code a recipe may run, for a method of your own."""

    @model_validator(mode="before")
    @classmethod
    def _fill_by_method(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if isinstance(raw.get("plugins"), dict):  # as a run's config.json has them, each with its identity
            raw = {**raw, "plugins": list(raw["plugins"])}
        return _below(cls.of_method.defaults(raw), raw)

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, raw: Any) -> Any:
        """First of all, so that no message about another field repeats one."""
        refuse_secrets(raw)
        return raw

    @model_validator(mode="after")
    def _fits_its_method(self) -> Config:
        self.of_method.check(self, self.own)
        if self.train.engine == "trl" and self.objective.for_trl() is None:
            raise ValueError(f"train.engine: trl trains on pairs; use fsdp for method: {self.method}")
        for package in self.plugins:
            identity_of(package)
        return self

    @property
    def own(self) -> Any:
        """The section of the run's own method."""
        return getattr(self, self.of_method.section)

    @property
    def steps(self) -> tuple[Step, ...]:
        """From questions to training examples."""
        return self.of_method.steps(self, self.own)

    @property
    def evaluation(self) -> Evaluation:
        """What each policy is asked."""
        return self.of_method.evaluation(self, self.own)

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        return self.of_method.objective(self, self.own)

    @property
    def training(self) -> Train:
        """The step that trains."""
        from calm_ray.methods.shared.train import Train

        return Train(self, self.objective, self.steps[-1])

    @property
    def graph(self) -> Graph:
        """All steps of a round, in their order."""
        return Graph((*self.steps, self.training), self.evaluation, self.of_method.section)

    @property
    def needs_gold(self) -> bool:
        """Whether the questions trained on must have gold answers."""
        return self.of_method.needs_gold(self.own)

    @property
    def writes(self) -> bool:
        """Whether the engines write completions at all, to sample or to answer held-out questions."""
        return any(step.writes for step in (*self.steps, *self.evaluation))

    @property
    def remark(self) -> str | None:
        """What a person should know when the run starts."""
        return self.of_method.remark(self, self.own)

    def as_record(self) -> dict[str, Any]:
        """What a run's config.json holds: every key, and what code its plug-ins are."""
        return {**self.model_dump(mode="json"), "plugins": {name: identity_of(name) for name in self.plugins}}


def _below(defaults: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe over the defaults of its method, section by section; a section may be left empty."""
    merged = dict(raw)
    for name, section in defaults.items():
        given = raw.get(name)
        if given is None or isinstance(given, Mapping):
            merged[name] = {**section, **(given or {})}
    return merged


def parse_config(raw: Any, allowed: Sequence[str] | None = None) -> Config:
    """The configuration that keys and values make. Raises ValueError, of which pydantic's ValidationError is one.

    `allowed` are the packages whose code may run; None for those that `plugins` names, as in a recipe.
    """
    return config_class(raw, allowed).model_validate(raw)


def config_class(raw: Any, allowed: Sequence[str] | None = None) -> type[Config]:
    """The configurations of the method that is named. Raises ValueError for one that is not known or not allowed."""
    named: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    if allowed is None:
        plugins = named.get("plugins")
        allowed = [str(name) for name in plugins] if isinstance(plugins, list | dict) else []
    return _class_of(str(named.get("method", DEFAULT_METHOD)), tuple(allowed))


@lru_cache
def _class_of(name: str, allowed: Sequence[str]) -> type[Config]:
    """With the sections of all methods that belong to calm_ray, since a recipe may serve several, and its own."""
    own = method_named(name, allowed)
    settings: dict[str, type[Section]] = {each.section: each.settings for each in METHODS.values()}
    if settings.setdefault(own.section, own.settings) is not own.settings or own.section in Config.model_fields:
        raise ValueError(f"method: {name} calls its section {own.section}, which is the name of another one")
    sections: dict[str, Any] = {
        section: (kind, ... if any(field.is_required() for field in kind.model_fields.values()) else kind())
        for section, kind in settings.items()
    }
    made = create_model("Config", __base__=Config, __doc__=Config.__doc__, **sections)
    made.of_method = own
    return made
