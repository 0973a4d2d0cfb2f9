"""Joins or starts the Ray cluster of a run, and checks that the run fits."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.cluster.nodes import kinds_of_cluster
from calm_ray.cluster.resources import ENGINE_SLOT, TRAIN_SLOT, Needs, Resources, shortage
from calm_ray.core.console import say
from calm_ray.core.errors import InputError, ResourceError
from calm_ray.core.exit_codes import interrupt_on_sigterm
from calm_ray.run.storage import Storage

WAIT_SECONDS = 30
TOKEN = "RAY_AUTH_TOKEN"
NOT_JOINED = (
    "If the cluster is no longer there, `ray stop` forgets it; if it asks for a token, set RAY_AUTH_TOKEN. To run in a "
    "local Ray of its own instead, set RAY_ADDRESS=local."
)


@contextmanager
def cluster(needs: Needs, *, least: Needs | None = None, local_cpus: int = 0) -> Iterator[None]:
    """Joins the cluster this process belongs to, or starts a local Ray and shuts it down afterwards.

    A local one is sized for `needs`, with at least `local_cpus` logical CPUs. Raises ResourceError if the cluster can
    never hold `least` (default: `needs`).

    Joins whatever Ray would join: RAY_ADDRESS, a submitted job, or `ray start` on this machine.
    """
    if ray.is_initialized():
        check_resources(least or needs)
        yield
        return
    _silence_ray()
    joined = _start_or_join(max(local_cpus, math.ceil(needs.total["CPU"])), needs.count("worker"))
    interrupt_on_sigterm()
    try:
        check_resources(least or needs)
        say(_describe(joined))
        yield
    finally:
        ray.shutdown()


def _start_or_join(cpus: int, train_slots: int) -> bool:
    """Starts a local Ray or joins an existing cluster; returns whether it joined."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray protects a local cluster with a token that it would save in the user's home directory, where it would also
    # apply to every cluster started later. This token is only for this run's processes.
    has_own_token = TOKEN not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ
    if has_own_token:
        os.environ[TOKEN] = secrets.token_hex(32)
    try:
        ray.init(num_cpus=cpus, resources={TRAIN_SLOT: train_slots} if train_slots else None, **options)
        return False
    except ValueError:  # an existing cluster has its own size and token
        if has_own_token:
            del os.environ[TOKEN]
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise ResourceError(f"{error}. {NOT_JOINED}") from None
        return True


def _silence_ray() -> None:
    """Keeps Ray's messages out of the run's progress; its logs are in its session folder."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def check_resources(needs: Needs) -> None:
    """Raises ResourceError if the cluster cannot hold what the run needs, even at its maximum size."""
    most = max_resources()
    if problem := shortage(needs, {name: most.get(name, 0.0) for name in needs.total}, kinds_of_nodes()):
        raise ResourceError(f"engines and train.workers: {problem}")
    for what, slot, key in (("worker", TRAIN_SLOT, "train.workers"), ("engine", ENGINE_SLOT, "engines")):
        slots, count = most.get(slot, 0.0), needs.count(what)
        if 0 < slots < count:
            raise ResourceError(
                f"{key}: {count} {what}s need a slot each, but the cluster has only {slots:g} ({slot}); use fewer, "
                f"or start more nodes with `ray start --resources '{{\"{slot}\": N}}'`"
            )


def max_resources() -> Resources:
    """The cluster's resources at its maximum size."""
    present, limits = ray.cluster_resources(), ray_state.get_max_resources_from_cluster_config() or {}
    return {name: max(present.get(name, 0.0), float(limits.get(name, 0.0))) for name in {*present, *limits}}


def kinds_of_nodes() -> list[Resources]:
    """Resources of the nodes that are alive, and of those the cluster may start."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]] + [
        kind.resources for kind in kinds_of_cluster()
    ]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For actors that live and die with the driver's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def free_resources() -> str:
    free = ray.available_resources()
    return f"free in the cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"


def check_storage(storage: Storage) -> None:
    """Raises InputError unless every node sees the files that the driver writes."""
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
            f"storage: {storage.uri()} is not visible on {len(blind)} of {len(nodes)} nodes ({', '.join(blind)}); "
            "use a folder mounted on all of them, or a URI such as s3://bucket/runs"
        )


def _describe(joined: bool) -> str:
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    where = "joined a cluster" if joined else "started a local Ray"
    return f"{where}: {nodes} node(s), {resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
