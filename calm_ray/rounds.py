"""The method on one screen: sample, prefer, train, refresh, evaluate, and again from the new policy."""

from __future__ import annotations

from typing import Any

from calm_ray.cluster.connection import check_storage, cluster
from calm_ray.cluster.run_lock import locked_in_cluster
from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.engines.pool import EnginePool
from calm_ray.job.cluster_check import check_layout
from calm_ray.job.engines import engine_spec
from calm_ray.job.ingest import take_questions
from calm_ray.job.initial_policy import check_start, start_policy
from calm_ray.job.preflight import prepare
from calm_ray.job.round import Stages
from calm_ray.job.summary import summarise
from calm_ray.methods.dco.gamma import check_gamma
from calm_ray.planning.needs import needs_of
from calm_ray.run.directory import RunDirectory
from calm_ray.run.lock import locked
from calm_ray.run.policies import RunModel
from calm_ray.run.provenance import about
from calm_ray.run.repair import mend


def align(config: Config, *, overwrite: bool = False, redo: bool = False) -> RunDirectory:
    """Runs a configuration from where it stands to its end; returns the run directory.

    A run that is finished is compared with its manifests, and left as it is where nothing is missing. Raises
    InputError for bad input, before any engine starts, and for a run that differs in what was done already, unless
    that is to be done again (`redo`).
    """
    run = RunDirectory(config.storage, config.name)
    say(f"run: {run.uri}")
    with locked(run.storage, say):
        _align(config, run, overwrite=overwrite, redo=redo)
    return run


def _align(config: Config, run: RunDirectory, *, overwrite: bool, redo: bool) -> None:
    settings = config.model_dump(mode="json")
    run.check(settings, overwrite, redo=redo)
    if not overwrite and _is_whole(run, settings):
        say("it is finished: raise rounds to go on, or add --overwrite to delete it and start again")
        return
    if config.method == "dco":
        say(check_gamma(config.dco, config.languages, config.train.beta))
    anew = overwrite or run.starts_over(settings)
    known = None if anew else run.model
    inputs = prepare(config, known)
    check_start(config, run, known or inputs.model, overwrite=anew)
    needs, least = (
        needs_of(config, training=config.rounds > 0, workers=workers)
        for workers in (config.train.most_workers, config.train.least_workers)
    )
    with cluster(needs, least=least), locked_in_cluster(run.uri):
        check_layout(config, inputs.folder)
        for line in run.begin(settings, about(), overwrite):
            say(line)
        mend(run)
        check_storage(run.storage)
        model = run.share_model(inputs.model, inputs.folder)
        with EnginePool(engine_spec(config, model), config.languages, say) as pool:
            check_storage(run.storage)  # again, for nodes that came with the engines
            take_questions(config, run, model, pool, inputs)
            run_to_end(config, run, model, pool)


def _is_whole(run: RunDirectory, settings: dict[str, Any]) -> bool:
    """Whether a run has all that a configuration asks for, as it was written."""
    if not run.is_complete(settings):
        return False
    mend(run)
    return run.is_complete(settings)


def run_to_end(config: Config, run: RunDirectory, model: RunModel, pool: EnginePool) -> None:
    """What is left of a run that has its questions, with engines that are there."""
    run_rounds(config, run, Stages(config, run, model, pool))
    run.finish({"engine_starts": pool.starts, "engines": len(pool.replicas)})


def run_rounds(config: Config, run: RunDirectory, stages: Stages) -> None:
    """The rounds, from where they stand."""
    policy = start_policy(config, run)
    stages.evaluate(0, policy, policy)
    summarise(config, run)
    for number in range(1, config.rounds + 1):
        start = policy
        stages.sample(number, start)
        stages.prefer(number, start)
        policy = stages.train(number, start)
        stages.evaluate(number, policy, start)
        summarise(config, run)
