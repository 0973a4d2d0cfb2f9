"""`init_from`: the policy of an earlier run that a run starts from, copied into the run."""

from __future__ import annotations

from dataclasses import replace

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.job.open_run import OpenedRun, open_run
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.storage import Storage, storage_named


def check_start(config: Config, run: RunDirectory, model: RunModel, *, overwrite: bool = False) -> None:
    """Raises InputError unless the run that is named has a policy that this one can go on from.

    A run that has its copy of that policy needs the earlier run no more, if it is not overwritten.
    """
    if config.init_from is None or (run.start is not None and not overwrite):
        return
    earlier = _earlier(config)
    there = earlier.run.uri
    if there == run.uri:
        raise InputError(f"init_from: {there} is this run itself; give this run another name")
    if earlier.policy(None).kind == "base":
        raise InputError(f"init_from: {there} has trained no policy yet; run it to its end first")
    if (trained := earlier.model().name) != model.name:
        raise InputError(f"init_from: {there} trained {trained}, and model is {model.name} here")
    if (lora := earlier.lora) != config.train.lora:
        raise InputError(f"init_from: train.lora must be as it is in {there}: {'null' if lora is None else lora}")


def initial_policy(config: Config, run: RunDirectory) -> Policy:
    """What round 1 starts from: the model itself, or a copy of an earlier run's last policy, made once."""
    if config.init_from is None:
        return Policy()
    if run.start is None:
        policy = _earlier(config).policy(None)
        run.storage.upload(policy.local_folder(), "start")
        copy = replace(policy, name=f"start-{policy.sha256[:8]}", round=0, location=run.storage.uri("start"))
        run.storage.write_json("start.json", copy.as_json())
    assert run.start is not None
    return run.start


def _earlier(config: Config) -> OpenedRun:
    named = str(config.init_from)
    location = storage_named(named).uri() if "/" in named else Storage(config.storage).uri(named)
    try:
        return open_run(location)
    except InputError as error:
        raise InputError(f"init_from: {error}") from None
