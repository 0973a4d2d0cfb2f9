"""Drives one or more runs from start to finish: locks, checks, cluster, repair, engines, rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from calm_ray.cluster.connection import check_resources, check_storage, cluster
from calm_ray.cluster.resources import Needs
from calm_ray.cluster.run_lock import locked_in_cluster
from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.engines.pool import EnginePool
from calm_ray.job.changes import changes_of
from calm_ray.job.cluster_check import check_layout
from calm_ray.job.engines import engine_spec
from calm_ray.job.ingest import take_questions
from calm_ray.job.initial_policy import check_init_from
from calm_ray.job.job import Job
from calm_ray.job.preflight import Inputs, prepare, requirements_of
from calm_ray.planning.needs import needs_of
from calm_ray.rounds import run_rounds
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Changes
from calm_ray.run.lock import locked
from calm_ray.run.policies import RunModel
from calm_ray.run.provenance import provenance
from calm_ray.run.repair import repair
from calm_ray.training.preflight import check_training


@dataclass(frozen=True)
class Launch:
    """A run to execute, with its options."""

    config: Config
    overwrite: bool = False
    redo: bool = False
    starts_from_another: bool = False
    """Whether it starts from the last policy of another run in the same launch."""

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.storage, self.config.name)

    def changes(self) -> Changes | None:
        """What differs from the existing run; None for a new or overwritten run."""
        return None if self.overwrite else changes_of(self.run, self.config)

    @property
    def keeps_model(self) -> bool:
        """Whether the existing run keeps its model and its initial policy."""
        changes = self.changes()
        return changes is not None and not changes.starts_over and self.run.model is not None

    def is_whole(self) -> bool:
        """Whether the run is complete and every file matches its manifest."""
        if not self.run.is_complete(self.config.rounds, self.changes()):
            return False
        repair(self.run, self.config.graph)
        return self.run.is_complete(self.config.rounds, self.changes())


Share = Callable[[Launch], None]
"""Copies what a run has in common with other runs."""


def align(config: Config, *, overwrite: bool = False, redo: bool = False) -> RunDirectory:
    """Starts or resumes a run and completes it; returns the run directory.

    Leaves a finished run unchanged if every file matches its manifest. Raises InputError, before any engine starts,
    for bad input and for changes to finished stages, unless `redo` is set.
    """
    (run,) = launch([Launch(config, overwrite, redo)])
    return run


def launch(
    launches: Sequence[Launch],
    *,
    check: Callable[[], None] = lambda: None,
    share_questions: Share = lambda launch: None,
    share_start: Share = lambda launch: None,
) -> list[RunDirectory]:
    """Executes the unfinished runs one after the other, on one cluster with the same engines.

    They must have the same storage, model, questions, languages and engines. `check` may raise InputError for other
    conflicts. `share_questions` is called before a run prepares its questions, `share_start` before its rounds.
    """
    with ExitStack() as locks:
        for each in launches:
            say(f"run: {each.run.uri}")
            locks.enter_context(locked(each.run.storage, say))
        for each in launches:
            each.run.check(each.changes(), overwrite=each.overwrite, redo=each.redo)
        todo = [each for each in launches if not each.is_whole()]
        check()
        if todo:
            for notice in dict.fromkeys(each.config.notice for each in todo):
                if notice:
                    say(notice)
            known = next((each.run.model for each in launches if each.keeps_model), None)
            _drive(todo, known, share_questions, share_start)
        else:
            say("already finished: raise rounds to continue, or pass --overwrite to delete the run and start over")
    return [each.run for each in launches]


def _drive(todo: Sequence[Launch], known: RunModel | None, share_questions: Share, share_start: Share) -> None:
    inputs = _prepare(todo, known)
    most = [needs_of(each.config, training=each.config.rounds > 0) for each in todo]
    largest = max(most, key=lambda needs: needs.count("worker"))
    cpus = max(math.ceil(needs.total["CPU"]) for needs in most)
    with cluster(largest, least=Needs([]), local_cpus=cpus), ExitStack() as locks:
        for each in todo:
            locks.enter_context(locked_in_cluster(each.run.uri))
        for each in todo:
            config = each.config
            least = needs_of(config, training=config.rounds > 0, workers=config.train.min_workers)
            check_resources(least)
            check_layout(config, inputs.folder)
        for each in todo:
            _begin(each, inputs)
        first = todo[0]
        check_storage(first.run.storage)
        model = first.run.model
        assert model is not None
        with EnginePool(engine_spec(first.config, model), first.config.languages, say) as engines:
            check_storage(first.run.storage)  # again, for nodes that the engines added
            for each in todo:
                if len(todo) > 1:
                    say(f"run: {each.run.uri}")
                _run(each, inputs, engines, share_questions, share_start)


def _prepare(todo: Sequence[Launch], known: RunModel | None) -> Inputs:
    """Loads the questions, with gold answers if any run needs them, and the model; checks them for every run."""
    # Reading many questions takes minutes, so runs with the same demands share one pass.
    by_demands = {requirements_of(each.config): each.config for each in todo}
    *_, inputs = [prepare(by_demands[demands], known) for demands in sorted(by_demands)]
    for each in todo:
        check_training(inputs.folder, each.config.train)
        if not each.starts_from_another:
            check_init_from(each.config, each.run, known or inputs.model, overwrite=not each.keeps_model)
    return inputs


def _begin(launch: Launch, inputs: Inputs) -> None:
    """Creates or resumes the run directory and repairs it."""
    config, run = launch.config, launch.run
    for line in run.begin(config.as_record(), provenance(), launch.changes(), overwrite=launch.overwrite):
        say(line)
    repair(run, config.graph)
    run.record_model(inputs.model, inputs.folder)


def _run(launch: Launch, inputs: Inputs, engines: EnginePool, share_questions: Share, share_start: Share) -> None:
    """Executes the rest of one run."""
    config, run, model = launch.config, launch.run, launch.run.model
    assert model is not None
    if launch.starts_from_another:
        check_init_from(config, run, model)
    share_questions(launch)
    take_questions(config, run, model, engines, inputs)
    job = Job(config, run, model, engines)
    job.initial_policy()
    share_start(launch)
    run_rounds(job)
    run.finish({"engine_starts": engines.starts, "engines": len(engines.replicas)})
