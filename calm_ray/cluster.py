"""The Ray cluster of a run: joins one or starts one, checks that a run can ever fit, and says what it waits for."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.config import Config
from calm_ray.errors import InputError
from calm_ray.storage import Storage

WAIT_SECONDS = 30
TOKEN = "RAY_AUTH_TOKEN"
DATA_CPUS = 0.5
"""Logical CPUs of one Ray Data task."""


def needed_resources(config: Config) -> dict[str, float]:
    """What a run holds at its fullest: all engines, and the training workers beside them."""
    engines = len(config.engines.homes(config.languages))
    gpus_per_engine = config.engines.tensor_parallel_size
    cpus = engines * max(config.engines.cpus, gpus_per_engine if gpus_per_engine > 1 else 0)
    cpus += max(config.train.workers * config.train.cpus_per_worker, DATA_CPUS)
    gpus = engines * gpus_per_engine + config.train.workers if config.device == "gpu" else 0
    return {"CPU": cpus, "GPU": gpus}


@contextmanager
def cluster(config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Joins the cluster this process belongs to, or starts a local Ray sized for the run and shuts it down.

    A cluster is joined where Ray would join one: RAY_ADDRESS, a submitted job, or `ray start` on this machine.
    """
    needed = needed_resources(config)
    if ray.is_initialized():
        check_resources(needed)
        yield
        return
    _keep_quiet()
    joined = _start_or_join(math.ceil(needed["CPU"]))
    try:
        check_resources(needed)
        say(_describe(joined))
        yield
    finally:
        ray.shutdown()


def _start_or_join(cpus: int) -> bool:
    """Starts a local Ray, or joins the cluster that is there; returns whether it joined."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray protects a local cluster with a token and would leave it in the user's home, where it locks every cluster
    # that is started later. This one is for this run's processes alone.
    has_own_token = TOKEN not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ
    if has_own_token:
        os.environ[TOKEN] = secrets.token_hex(32)
    try:
        ray.init(num_cpus=cpus, **options)
        return False
    except ValueError:  # a cluster is there already, and has its own size and token
        if has_own_token:
            del os.environ[TOKEN]
        ray.init(**options)
        return True


def _keep_quiet() -> None:
    """Leaves the terminal to the run's own progress; Ray's logs are in its session folder."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def check_resources(needed: dict[str, float]) -> None:
    """Raises InputError where the cluster, grown as far as it may, can never hold what the run needs."""
    present = ray.cluster_resources()
    limits = ray_state.get_max_resources_from_cluster_config() or {}
    most = {name: max(present.get(name, 0.0), float(limits.get(name, 0.0))) for name in needed}
    short = {name: amount for name, amount in needed.items() if amount > most[name]}
    if short:
        wants = ", ".join(
            f"{amount:g} {name} (the cluster has at most {most[name]:g})" for name, amount in short.items()
        )
        raise InputError(
            f"engines and train.workers: this run needs {wants}. "
            "Lower engines.per_language, engines.shared, engines.cpus, train.workers or train.cpus_per_worker, "
            "or use a larger cluster."
        )


def wait_until_ready(references: Sequence[ray.ObjectRef[Any]], what: str, say: Callable[[str], None]) -> list[Any]:
    """The results of the references; every 30 s it says how many are there and what the cluster has to give."""
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=WAIT_SECONDS)
        for reference in done:
            ray.get(reference)  # an engine that failed to start stops the wait here
        if pending:
            free = ray.available_resources()
            say(
                f"waiting for {what}: {len(references) - len(pending)} of {len(references)} ready; "
                f"free in the cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
            )
    return ray.get(list(references))


def check_storage(storage: Storage) -> None:
    """Raises InputError unless every node of the cluster sees the files that the driver writes."""
    storage.write("probe/file", b"calm_ray")
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    @ray.remote(num_cpus=0)
    def sees() -> bool:
        return storage.exists("probe/file")

    strategy = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    seen = ray.get([sees.options(scheduling_strategy=one).remote() for one in strategy])
    storage.delete("probe")
    blind = [node[:8] for node, ok in zip(nodes, seen, strict=True) if not ok]
    if blind:
        raise InputError(
            f"storage: {storage.uri()} is not seen by {len(blind)} of {len(nodes)} nodes ({', '.join(blind)}); "
            "use a folder that is mounted on all of them, or a URI such as s3://bucket/runs"
        )


def _describe(joined: bool) -> str:
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    where = "joined a cluster" if joined else "started a local Ray"
    return f"{where}: {nodes} node(s), {resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
