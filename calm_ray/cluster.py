"""The Ray cluster of a run: joins one or starts one, checks that a run can ever fit, and says what it waits for."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.config import Config
from calm_ray.endings import end_on_sigterm
from calm_ray.errors import InputError, ResourceError
from calm_ray.storage import Storage

WAIT_SECONDS = 30
TOKEN = "RAY_AUTH_TOKEN"
DATA_CPUS = 0.5
"""Logical CPUs of one Ray Data task."""


Resources = dict[str, float]


@dataclass(frozen=True)
class Needs:
    """What a run asks of a cluster."""

    parts: list[tuple[int, Resources]]
    """(how many, what each takes on one node)."""

    @property
    def total(self) -> Resources:
        """All parts at the same time."""
        names = ("CPU", "GPU")
        return {name: sum(count * part.get(name, 0.0) for count, part in self.parts) for name in names}


def needs_of(config: Config, training: bool = True) -> Needs:
    """The engines of a run, and the training workers, which come and go beside them."""
    engines, gpus = config.engines, config.device == "gpu"
    size = engines.tensor_parallel_size
    engine = {"CPU": engines.cpus if size == 1 else float(size), "GPU": float(size * gpus)}
    parts = [(len(engines.homes(config.languages)), engine)]
    if training:
        worker = {"CPU": config.train.cpus_per_worker, "GPU": float(gpus)}
        parts += [(config.train.most_workers, worker)]
        spare = DATA_CPUS - config.train.most_workers * config.train.cpus_per_worker
        parts += [(1, {"CPU": spare})] if spare > 0 else []
    return Needs(parts)


@contextmanager
def cluster(needs: Needs, say: Callable[[str], None], local_cpus: int = 0) -> Iterator[None]:
    """Joins the cluster this process belongs to, or starts a local Ray and shuts it down.

    A local one is sized for the needs, and has `local_cpus` logical CPUs at least.

    A cluster is joined where Ray would join one: RAY_ADDRESS, a submitted job, or `ray start` on this machine.
    """
    if ray.is_initialized():
        check_resources(needs)
        yield
        return
    _keep_quiet()
    joined = _start_or_join(max(local_cpus, math.ceil(needs.total["CPU"])))
    end_on_sigterm()
    try:
        check_resources(needs)
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


def check_resources(needs: Needs) -> None:
    """Raises ResourceError where the cluster, grown as far as it may, can never hold what the run needs."""
    present = ray.cluster_resources()
    limits = ray_state.get_max_resources_from_cluster_config() or {}
    most = {name: max(present.get(name, 0.0), float(limits.get(name, 0.0))) for name in needs.total}
    if problem := shortage(needs, most, _kinds_of_nodes()):
        raise ResourceError(f"engines and train.workers: {problem}")


def shortage(needs: Needs, most: Resources, nodes: Sequence[Resources]) -> str | None:
    """Why a cluster that may grow to `most`, out of nodes of these kinds, cannot hold a run; None if it can."""
    short = {name: amount for name, amount in needs.total.items() if amount > most[name]}
    if short:
        wants = ", ".join(
            f"{amount:g} {name} (the cluster has at most {most[name]:g})" for name, amount in short.items()
        )
        return (
            f"this run needs {wants}. Lower engines.per_language, engines.shared, engines.cpus, train.workers or "
            "train.cpus_per_worker, use a larger cluster, or set device=cpu where there are no GPUs."
        )
    for _, part in needs.parts:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in part.items()) for node in nodes):
            wants = " and ".join(f"{amount:g} {name}" for name, amount in part.items() if amount)
            return (
                f"an engine or a worker needs {wants} on one node, and no node has that. "
                "Lower engines.tensor_parallel_size, engines.cpus or train.cpus_per_worker."
            )
    return None


def _kinds_of_nodes() -> list[Resources]:
    """What the nodes that are there have, and those that may be started."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = ray_state.get_cluster_config()
    return nodes + ([dict(kind.resources) for kind in config.node_group_configs] if config else [])


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For actors that live and die with the driver's machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def free_resources() -> str:
    free = ray.available_resources()
    return f"free in the cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"


def wait_until_ready(references: Sequence[ray.ObjectRef[Any]], what: str, say: Callable[[str], None]) -> list[Any]:
    """The results of the references; every 30 s it says how many are there and what the cluster has to give."""
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=WAIT_SECONDS)
        for reference in done:
            ray.get(reference)  # an engine that failed to start stops the wait here
        if pending:
            say(f"waiting for {what}: {len(references) - len(pending)} of {len(references)} ready; {free_resources()}")
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
