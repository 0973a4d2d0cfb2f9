"""The Ray cluster of a run: joins one or starts one, checks that a run can ever fit, and says what it waits for."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.config import Config
from calm_ray.endings import end_on_sigterm
from calm_ray.errors import InputError, ResourceError
from calm_ray.planning.hardware import DEVICES, MOST_NODES, Node
from calm_ray.planning.needs import TRAIN_PLACE, Needs, Resources, shortage
from calm_ray.planning.plan import check_plan
from calm_ray.progress import say
from calm_ray.storage import Storage

WAIT_SECONDS = 30
TOKEN = "RAY_AUTH_TOKEN"


@contextmanager
def cluster(needs: Needs, *, least: Needs | None = None, local_cpus: int = 0) -> Iterator[None]:
    """Joins the cluster this process belongs to, or starts a local Ray and shuts it down.

    A local one is sized for the needs, and has `local_cpus` logical CPUs at least. Raises ResourceError where one that
    is joined can never hold the needs, or the `least` of them.

    A cluster is joined where Ray would join one: RAY_ADDRESS, a submitted job, or `ray start` on this machine.
    """
    if ray.is_initialized():
        check_resources(least or needs)
        yield
        return
    _keep_quiet()
    joined = _start_or_join(max(local_cpus, math.ceil(needs.total["CPU"])), needs.count("worker"))
    end_on_sigterm()
    try:
        check_resources(least or needs)
        say(_describe(joined))
        yield
    finally:
        ray.shutdown()


def _start_or_join(cpus: int, train_places: int) -> bool:
    """Starts a local Ray, or joins the cluster that is there; returns whether it joined."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray protects a local cluster with a token and would leave it in the user's home, where it locks every cluster
    # that is started later. This one is for this run's processes alone.
    has_own_token = TOKEN not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ
    if has_own_token:
        os.environ[TOKEN] = secrets.token_hex(32)
    try:
        ray.init(num_cpus=cpus, resources={TRAIN_PLACE: train_places} if train_places else None, **options)
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
    places, workers = max(present.get(TRAIN_PLACE, 0), limits.get(TRAIN_PLACE, 0)), needs.count("worker")
    if 0 < places < workers:
        raise ResourceError(
            f"train.workers: {workers} need as many places to train, and the cluster has {places:g} ({TRAIN_PLACE}); "
            f"lower train.workers, or start more nodes with `ray start --resources '{{\"{TRAIN_PLACE}\": N}}'`"
        )


def _kinds_of_nodes() -> list[Resources]:
    """What the nodes that are there have, and those that may be started."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = ray_state.get_cluster_config()
    return nodes + ([dict(kind.resources) for kind in config.node_group_configs] if config else [])


# Ray's names of GPUs, where these tell their memory, and ours.
DEVICE_OF = {"A100-40G": "A100-40", "A100-80G": "A100-80", "H100": "H100", "H200": "H200"}


def check_layout(config: Config, model_folder: Path) -> None:
    """Raises ResourceError where the nodes that are there, or may be started, cannot hold a run, memory included.

    With `train.workers: [least, most]` they must say how many places they have to train.

    A model whose configuration says too little for a plan is left to the engines.
    """
    if config.train.is_elastic and config.rounds and not any(TRAIN_PLACE in node for node in _kinds_of_nodes()):
        raise ResourceError(
            "train.workers: [least, most] needs nodes that say how many workers they have room for: start them with "
            f"`ray start --resources '{{\"{TRAIN_PLACE}\": 8}}'`, or give train.workers one number"
        )
    try:
        check_plan(config, model_folder, _nodes())
    except InputError as error:
        say(f"the run is not planned: {error}")


def _nodes() -> list[Node]:
    """The nodes that are there, and those that may be started, as a plan sees them."""
    there = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = ray_state.get_cluster_config()
    for kind in config.node_group_configs if config else []:
        there += [dict(kind.resources)] * min(kind.max_count, MOST_NODES)
    return [_node(f"node {number}", one) for number, one in enumerate(there, start=1)]


def _node(name: str, resources: Resources) -> Node:
    kinds = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    gpu = next((DEVICE_OF[kind] for kind in kinds if kind in DEVICE_OF), None)
    memory = DEVICES[gpu].memory if gpu is not None else None
    return Node(name, resources.get("CPU", 0.0), int(resources.get("GPU", 0)), memory, gpu=gpu)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For actors that live and die with the driver's machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def free_resources() -> str:
    free = ray.available_resources()
    return f"free in the cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"


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
