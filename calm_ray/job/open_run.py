"""A run opened again, by the folder or URI a user names: to show, evaluate or export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Lora
from calm_ray.recipes import validated
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import PLUGINS
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.storage import Storage, storage_named


@dataclass(frozen=True)
class OpenedRun:
    run: RunDirectory
    plugins: tuple[str, ...] = ()
    """Packages whose code may run, where the run's method is one of them."""

    @cached_property
    def config(self) -> Config:
        """Raises InputError for a method whose code may not run."""
        noted = self.run.config
        config = validated(noted, self.run.uri, self.plugins)
        if config.as_record()[PLUGINS] != noted.get(PLUGINS, {}):
            say(f"{self.run.uri}: its plug-ins are not those that it was made with")
        return config

    @property
    def lora(self) -> Lora | None:
        """What it trains of the model; None for all weights."""
        lora = self.run.config["train"]["lora"]
        return None if lora is None else Lora.model_validate(lora)

    def model(self) -> RunModel:
        """The model the run started from."""
        if self.run.model is None:
            raise InputError(f"{self.run.uri}: the run has not begun (no model.json)")
        return self.run.model

    def policy(self, round_number: int | None) -> Policy:
        """The policy that a round made; 0 is the base, None the last one there is."""
        finished = self.run.trained_rounds()
        number = round_number if round_number is not None else max(finished, default=0)
        if number == 0:
            return self.run.start or Policy()
        if number not in finished:
            raise InputError(f"{self.run.uri}: round {number} has not been trained; there are {finished or 'none'}")
        return self.run.policy(number)


def _run_in(storage: Storage) -> RunDirectory:
    parent, _, name = storage.root.rpartition("/")
    return RunDirectory(parent or "/", name)


def find_run(location: str) -> RunDirectory | None:
    """The run in a folder or at a URI; None where there is none."""
    run = _run_in(storage_named(location))
    return run if run.storage.exists("config.json") else None


def open_run(location: str, plugins: Sequence[str] = ()) -> OpenedRun:
    """Raises InputError where there is no run."""
    run = _run_in(Storage(location))
    run.config  # noqa: B018 - raises
    return OpenedRun(run, tuple(plugins))
