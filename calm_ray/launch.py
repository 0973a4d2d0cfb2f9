"""Opens one run or several, and drives them to their end: locks, checks, cluster, engines, repair, rounds."""

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
from calm_ray.job.initial_policy import check_start
from calm_ray.job.job import Job
from calm_ray.job.preflight import Inputs, demands_of, prepare
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
    """A run to drive, and how."""

    config: Config
    overwrite: bool = False
    redo: bool = False
    starts_later: bool = False
    """Whether it starts from the last policy of a run that is launched before it."""

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.storage, self.config.name)

    def changes(self) -> Changes | None:
        """What the configuration means for the run that is there; None where there is none, or it is to go."""
        return None if self.overwrite else changes_of(self.run, self.config)

    @property
    def keeps_model(self) -> bool:
        """Whether the model, and the policy that it starts from, are there and stay."""
        changes = self.changes()
        return changes is not None and not changes.starts_over and self.run.model is not None

    def is_whole(self) -> bool:
        """Whether the run has all that its configuration asks for, as it was written."""
        if not self.run.is_complete(self.config.rounds, self.changes()):
            return False
        repair(self.run, self.config.graph)
        return self.run.is_complete(self.config.rounds, self.changes())


Share = Callable[[Launch], None]
"""Takes from other runs what this one has in common with them."""


def align(config: Config, *, overwrite: bool = False, redo: bool = False) -> RunDirectory:
    """Runs a configuration from where it stands to its end; returns the run directory.

    A run that is finished is compared with its manifests, and left as it is where nothing is missing. Raises
    InputError for bad input, before any engine starts, and for a run that differs in what was done already, unless
    that is to be done again (`redo`).
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
    """Runs what is not finished, one after the other, on one cluster and the same engines.

    All of them have one storage, model, questions, languages and engines. `check` raises InputError for what else must
    not be; `share_questions` and `share_start` come before a run takes its questions, and before its rounds.
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
            for remark in dict.fromkeys(each.config.remark for each in todo):
                if remark:
                    say(remark)
            known = next((each.run.model for each in launches if each.keeps_model), None)
            _drive(todo, known, share_questions, share_start)
        else:
            say("it is finished: raise rounds to go on, or add --overwrite to delete it and start again")
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
            least = needs_of(config, training=config.rounds > 0, workers=config.train.least_workers)
            check_resources(least)
            check_layout(config, inputs.folder)
        for each in todo:
            _begin(each, inputs)
        first = todo[0]
        check_storage(first.run.storage)
        model = first.run.model
        assert model is not None
        with EnginePool(engine_spec(first.config, model), first.config.languages, say) as engines:
            check_storage(first.run.storage)  # again, for nodes that came with the engines
            for each in todo:
                if len(todo) > 1:
                    say(f"run: {each.run.uri}")
                _run(each, inputs, engines, share_questions, share_start)


def _prepare(todo: Sequence[Launch], known: RunModel | None) -> Inputs:
    """The questions, those with gold answers if one run needs them, and the model; checked for every run."""
    # Reading takes minutes where there are many questions: runs that ask the same of them are read for once.
    by_demands = {demands_of(each.config): each.config for each in todo}
    *_, inputs = [prepare(by_demands[demands], known) for demands in sorted(by_demands)]
    for each in todo:
        check_training(inputs.folder, each.config.train)
        if not each.starts_later:
            check_start(each.config, each.run, known or inputs.model, overwrite=not each.keeps_model)
    return inputs


def _begin(launch: Launch, inputs: Inputs) -> None:
    """Makes or resumes the run's directory, and repairs what it holds."""
    config, run = launch.config, launch.run
    for line in run.begin(config.as_record(), provenance(), launch.changes(), overwrite=launch.overwrite):
        say(line)
    repair(run, config.graph)
    run.share_model(inputs.model, inputs.folder)


def _run(launch: Launch, inputs: Inputs, engines: EnginePool, share_questions: Share, share_start: Share) -> None:
    """What is left of one run."""
    config, run, model = launch.config, launch.run, launch.run.model
    assert model is not None
    if launch.starts_later:
        check_start(config, run, model)
    share_questions(launch)
    take_questions(config, run, model, engines, inputs)
    job = Job(config, run, model, engines)
    job.initial_policy()
    share_start(launch)
    run_rounds(job)
    run.finish({"engine_starts": engines.starts, "engines": len(engines.replicas)})
