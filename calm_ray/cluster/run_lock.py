"""Allows one driver per run within a cluster, whatever the storage: the lock is an actor named after the run.

Actor names are unique in Ray. The actor is not detached: it ends with its driver, however that dies, and so no lock
outlives its owner. The name is free again within seconds, which `_acquire` waits for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, RayError

from calm_ray.cluster.connection import on_this_node
from calm_ray.run.lock_owner import InUseError

NAMESPACE = "calm_ray"
PATIENCE_SECONDS = 3.0
"""How long the name may stay taken after a driver has died."""


class Holder:
    """Holds a run's name as long as its driver lives; does nothing else."""


@contextmanager
def locked_in_cluster(uri: str) -> Iterator[None]:
    """Locks the run at this URI against all other drivers of the Ray cluster while the block runs.

    Raises InUseError if another driver holds the lock.
    """
    name = f"run-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    holder = _acquire(name, uri)
    try:
        yield
    finally:
        if ray.is_initialized():
            with suppress(RayError):  # the cluster itself may have failed
                ray.kill(holder)


def _acquire(name: str, uri: str) -> ActorHandle[Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    ours: ActorHandle[Any] | None = None
    other = "another driver"
    while time.monotonic() < deadline:
        ours = ours or _create(name)
        found = _find(name)
        # Two drivers may both find the name free; the owner is the one whose actor is registered under it.
        if ours is not None and found == ours:
            return ours  # not `found`: the actor ends when its original handle is dropped
        if found is not None:
            ours, other = None, _describe_driver(found)
        time.sleep(0.1)
    raise InUseError(
        f"{uri}: in use in this cluster by {other}. "
        "A run has one driver: stop that one first, or give this run another name."
    )


def _create(name: str) -> ActorHandle[Any] | None:
    """Creates an actor of that name; None if it is taken."""
    options: dict[str, Any] = {
        "name": name, "namespace": NAMESPACE, "lifetime": "non_detached", "num_cpus": 0,
        # On the driver's node, so that no other node's loss releases the lock; restarted if its process is killed.
        "scheduling_strategy": on_this_node(), "max_restarts": -1,
    }  # fmt: skip
    try:
        return ray.remote(Holder).options(**options).remote()
    except ActorAlreadyExistsError:
        return None


def _find(name: str) -> ActorHandle[Any] | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _describe_driver(holder: ActorHandle[Any]) -> str:
    """Describes the actor's driver, from Ray's job table because the actor itself may still be starting."""
    number = holder._actor_id.job_id.hex()
    for job in ray_state.job_table():
        if job["JobID"] == number:
            since = datetime.fromtimestamp(job["StartTime"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            return f"process {job['DriverPid']} on {job['DriverIPAddress']}, since {since}"
    return f"job {number}"
