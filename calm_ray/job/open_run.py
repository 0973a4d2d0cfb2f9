"""Opens an existing run by folder or URI, to show, evaluate or export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Lora
from calm_ray.recipes.load import validated
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import PLUGINS
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.storage import Storage, storage_at


@dataclass(frozen=True)
class OpenedRun:
    run: RunDirectory
    plugins: tuple[str, ...] = ()
    """Packages whose code may run if the run's method is one of them."""

    @cached_property
    def config(self) -> Config:
        """Raises InputError if the method's code may not run."""
        recorded = self.run.config
        config = validated(recorded, self.run.uri, self.plugins)
        if config.as_record()[PLUGINS] != recorded.get(PLUGINS, {}):
            say(f"{self.run.uri}: its plug-ins differ from those it was created with")
        return config

    @property
    def lora(self) -> Lora | None:
        """The LoRA settings; None if the run trains all weights."""
        lora = self.run.config["train"]["lora"]
        return None if lora is None else Lora.model_validate(lora)

    def model(self) -> RunModel:
        """The model the run started from."""
        if self.run.model is None:
            raise InputError(f"{self.run.uri}: the run has not started (no model.json)")
        return self.run.model

    def policy(self, round_number: int | None) -> Policy:
        """The policy of a round; 0 is the base, None the latest."""
        finished = self.run.trained_rounds()
        number = round_number if round_number is not None else max(finished, default=0)
        if number == 0:
            return self.run.start or Policy()
        if number not in finished:
            raise InputError(
                f"{self.run.uri}: round {number} has not been trained; trained rounds: {finished or 'none'}"
            )
        return self.run.policy(number)


def _run_in(storage: Storage) -> RunDirectory:
    parent, _, name = storage.root.rpartition("/")
    return RunDirectory(parent or "/", name)


def find_run(location: str) -> RunDirectory | None:
    """The run in a folder or at a URI; None if there is none."""
    run = _run_in(storage_at(location))
    return run if run.storage.exists("config.json") else None


def open_run(location: str, plugins: Sequence[str] = ()) -> OpenedRun:
    """The run in a folder or at a URI. Raises InputError if there is none."""
    run = _run_in(Storage(location))
    run.config  # noqa: B018 - raises
    return OpenedRun(run, tuple(plugins))
