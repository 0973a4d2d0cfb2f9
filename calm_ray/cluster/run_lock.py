"""One driver for each run within a cluster, whatever the storage: an actor that is named after the run.

Ray lets one actor have a name. This one is not detached: it belongs to its driver and ends with it, however that
dies, so no lock is ever left whose owner is gone. Its name is free within seconds then, which is waited for.
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
"""How long the name of a driver that has died may still be taken."""


class Holder:
    """Has a run's name for as long as its driver lives; does nothing."""


@contextmanager
def locked_in_cluster(uri: str) -> Iterator[None]:
    """Keeps the run at this URI to this driver until the block is left, among all drivers of the Ray cluster.

    Raises InUseError where another driver works on it.
    """
    name = f"run-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    holder = _acquire(name, uri)
    try:
        yield
    finally:
        if ray.is_initialized():
            with suppress(RayError):  # the cluster may be what has failed
                ray.kill(holder)


def _acquire(name: str, uri: str) -> ActorHandle[Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    ours: ActorHandle[Any] | None = None
    other = "another driver"
    while time.monotonic() < deadline:
        ours = ours or _create(name)
        found = _named(name)
        # Two that create at once both find the name free: who has it is who is found under it.
        if ours is not None and found == ours:
            return ours  # not `found`: Ray ends an actor with the handle that it was made with
        if found is not None:
            ours, other = None, _driver_of(found)
        time.sleep(0.1)
    raise InUseError(
        f"{uri}: in use in this cluster by {other}. "
        "A run has one driver: stop that one first, or give this run another name."
    )


def _create(name: str) -> ActorHandle[Any] | None:
    """An actor of that name; None where there is one already."""
    options: dict[str, Any] = {
        "name": name, "namespace": NAMESPACE, "lifetime": "non_detached", "num_cpus": 0,
        # With the driver, which no other node's end concerns; and again, should its process be killed.
        "scheduling_strategy": on_this_node(), "max_restarts": -1,
    }  # fmt: skip
    try:
        return ray.remote(Holder).options(**options).remote()
    except ActorAlreadyExistsError:
        return None


def _named(name: str) -> ActorHandle[Any] | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _driver_of(holder: ActorHandle[Any]) -> str:
    """Who made the actor, from Ray's table of jobs: the actor itself may still be starting."""
    number = holder._actor_id.job_id.hex()
    for job in ray_state.job_table():
        if job["JobID"] == number:
            since = datetime.fromtimestamp(job["StartTime"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            return f"process {job['DriverPid']} on {job['DriverIPAddress']}, since {since}"
    return f"job {number}"
