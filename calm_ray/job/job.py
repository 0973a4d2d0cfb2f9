"""A run with what its rounds need: configuration, directory, model and engines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from calm_ray.config import Config
from calm_ray.engines.pool import EnginePool
from calm_ray.job.initial_policy import initial_policy
from calm_ray.job.summary import summarize
from calm_ray.methods.round import Round
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Graph
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage


@dataclass(frozen=True)
class Job:
    config: Config
    run: RunDirectory
    model: RunModel
    engines: EnginePool

    @cached_property
    def graph(self) -> Graph:
        return self.config.graph

    @property
    def questions(self) -> dict[str, Stage]:
        """The training and held-out questions, as steps read them."""
        return {"questions": self.run.questions("align"), "held_out": self.run.questions("held_out")}

    def initial_policy(self) -> Policy:
        """The policy round 1 starts from."""
        return initial_policy(self.config, self.run)

    def round(self, number: int, start: Policy, policy: Policy | None = None) -> Round:
        return Round(number, self.config, self.run, self.graph, self.model, self.engines, start, policy)

    def summarize(self) -> None:
        """Writes summary.json for the finished rounds."""
        summarize(self.config, self.run)
