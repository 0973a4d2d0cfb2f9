"""`init_from`: starts a run from a copy of an earlier run's policy."""

from __future__ import annotations

from dataclasses import replace

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.job.open_run import OpenedRun, open_run
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.storage import Storage, storage_at


def check_init_from(config: Config, run: RunDirectory, model: RunModel, *, overwrite: bool = False) -> None:
    """Raises InputError unless the named run has a policy that this run can start from.

    Once a run has its copy of that policy, it no longer needs the earlier run, unless it is overwritten.
    """
    if config.init_from is None or (run.start is not None and not overwrite):
        return
    earlier = _earlier(config)
    uri = earlier.run.uri
    if uri == run.uri:
        raise InputError(f"init_from: {uri} is this run itself; give this run another name")
    if earlier.policy(None).kind == "base":
        raise InputError(f"init_from: {uri} has not trained a policy yet; finish it first")
    if (trained := earlier.model().name) != model.name:
        raise InputError(f"init_from: {uri} trained {trained}, but model is {model.name} here")
    if (lora := earlier.lora) != config.train.lora:
        raise InputError(f"init_from: train.lora must match that of {uri}: {'null' if lora is None else lora}")


def initial_policy(config: Config, run: RunDirectory) -> Policy:
    """The policy round 1 starts from: the base model, or a copy of an earlier run's last policy, made once."""
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
    name = str(config.init_from)
    location = storage_at(name).uri() if "/" in name else Storage(config.storage).uri(name)
    try:
        return open_run(location)
    except InputError as error:
        raise InputError(f"init_from: {error}") from None
