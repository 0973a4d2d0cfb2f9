"""One engine of the pool as the driver sees it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError, RayError, RayTaskError

from calm_ray.engines.health import NEXT, Health
from calm_ray.engines.requests import ChunkRequest, Counts, Write
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.policies import Policy

if TYPE_CHECKING:
    from calm_ray.engines.actor import EngineActor

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class EngineHandle:
    """Picklable handle to an engine actor. Calls return an object reference immediately."""

    actor: ActorProxy[EngineActor]

    def ready(self) -> ray.ObjectRef[str]:
        return self.actor.ready.remote()

    def load(self, policy: Policy) -> ray.ObjectRef[str]:
        return self.actor.load.remote(policy)

    def serve(self, task: ChunkTask, request: ChunkRequest[Any, Any]) -> ray.ObjectRef[Counts]:
        return self.actor.serve.remote(task, request)

    def write(self, request: Write, policy: Policy, ticket: int) -> ray.ObjectRef[list[str]]:
        return self.actor.write.remote(request, policy, ticket)

    def sleep(self) -> ray.ObjectRef[None]:
        return self.actor.sleep.remote()

    def wake(self) -> ray.ObjectRef[None]:
        return self.actor.wake.remote()

    def restart(self) -> None:
        """Kills the process; Ray restarts it."""
        ray.kill(self.actor, no_restart=False)

    def stop(self) -> None:
        ray.kill(self.actor)


@dataclass
class Replica:
    """The driver's record of one engine."""

    number: int
    home: str | None
    """Home language; None if engines are shared."""
    engine: EngineHandle
    health: Health = Health.STARTING
    call: ray.ObjectRef[Any] | None = None
    """The call in flight: starting, loading a policy or serving a chunk."""
    since: float = 0.0
    task: ChunkTask | None = None
    has_run: bool = False
    """Whether it has ever come up."""
    has_failed: bool = False
    """Whether it has ever failed to come up."""
    starts: int = 0
    """Start count when it last came up or died."""
    deaths: int = 0
    """Deaths since it last finished a chunk."""

    @property
    def name(self) -> str:
        return f"engine {self.number}" + (f" ({self.home})" if self.home else "")

    @property
    def may_retry(self) -> bool:
        """Whether to call it again. Calls to an engine that is not up yet fail immediately, so they are spaced out."""
        return time.monotonic() - self.since > POLL_SECONDS

    def starts_since(self, starts: dict[int, int]) -> int:
        """Number of starts since it last came up or died.

        `starts` is `Heartbeats.starts`, which counts from zero again if that actor restarts.
        """
        self.starts = min(self.starts, starts.get(self.number, 0))
        return starts.get(self.number, 0) - self.starts

    def becomes(self, health: Health) -> None:
        assert health in NEXT[self.health], f"{self.name}: {self.health} to {health}"
        self.health = health

    def track(self, call: ray.ObjectRef[Any], task: ChunkTask | None = None) -> None:
        self.call, self.task, self.since = call, task, time.monotonic()


def all_failed_to_start(replicas: Sequence[Replica], starts: dict[int, int]) -> bool:
    """Whether every engine that has started so far (`Heartbeats.starts`) has failed to come up."""
    return all(one.has_failed and not one.has_run for one in replicas if one.number in starts)


def reason_of(error: Exception) -> str:
    """Why a call failed, in one line: the last one of a remote traceback."""
    if isinstance(error, RayActorError) and not error.actor_init_failed:
        return "its node was preempted" if error.preempted else "its process or node was lost"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return re.sub(r"^calm_ray\.core\.errors\.\w+: ", "", last)


def missing_module(error: Exception) -> str | None:
    """The module that an engine lacks to unpickle its request; Ray reports it only in the message."""
    found = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", str(error))
    return found[1] if found is not None and isinstance(error, RayTaskError) else None


def is_node_lost(error: RayError, node: str | None) -> bool:
    """Whether an engine died with its node, as far as Ray knows."""
    if not isinstance(error, RayActorError):
        return False
    return error.preempted or (node is not None and node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]})


def remote_traceback(error: Exception) -> str:
    """Traceback to diagnose a failed vLLM start; empty for our own errors, whose message suffices."""
    return "" if "calm_ray.core.errors." in str(error) else str(error)
