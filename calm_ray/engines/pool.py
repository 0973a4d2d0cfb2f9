"""The engine pool: warm engine actors, per language or shared by all, and their health.

Engines start once and stay up until the pool is closed. Ray restarts one that dies, hangs or is lost with its node, on
another node if necessary; it serves again only after loading the current policy. Arrows point from caller to callee:

    Dispatcher <--next, finished, died-- EnginePool --load, serve--> EngineActor <--chunks, rows--> storage
                                             |                            |
                       silence, starts, ages |                            | started, begins, beat
                                             +-------> Heartbeats <-------+

- The pool waits for any engine's call to finish, POLL_SECONDS at most, then for Heartbeats. It never blocks on a single
  engine: one that exceeds `heartbeat_timeout_s` or `chunk_timeout_s` is killed, and Ray restarts it.
- The dispatcher waits for nobody. It is a plain object that picks chunks and learns from the pool how they ended.
- An engine waits for Heartbeats: at startup while the pool is asleep, and before each request until `begins` is
  recorded, so that an earlier death does not count against the chunk. Beats are fire-and-forget.
- Heartbeats waits for nobody, so it always answers.
- A TextService calls engines directly, bypassing pool and dispatcher, and reads the same Heartbeats.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from calm_ray.cluster.connection import WAIT_SECONDS, free_resources, on_this_node
from calm_ray.core.errors import CalmRayError
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.health import Health, Heartbeats, Patience
from calm_ray.engines.placement import Placement
from calm_ray.engines.replica import (
    POLL_SECONDS,
    EngineHandle,
    Replica,
    all_failed_to_start,
    is_node_lost,
    missing_module,
    reason_of,
    remote_traceback,
)
from calm_ray.engines.requests import ChunkRequest, Counts
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.text_service import TextService
from calm_ray.run.policies import Policy


class EnginePool:
    """Each engine has a home language (None if engines are shared). Once that has no chunks left, the engine helps with
    the language that has the most: the weights are the same.
    """

    def __init__(self, spec: EngineSpec, languages: list[str], say: Callable[[str], None]) -> None:
        self.spec, self._say = spec, say
        self._settings = spec.engines
        self.policy = Policy()
        self.refresh_seconds = 0.0
        """How long the last `run` took until every engine had the new policy. Other engines served meanwhile."""
        self.replicas: list[Replica] = []
        self._late: set[int] = set()  # engines that `text_service` gave up waiting for
        self._last_report = time.monotonic()
        # Engines look it up by name: a handle may have become invalid by the time one restarts.
        self._heartbeats_name = f"heartbeats-{uuid.uuid4().hex}"
        options = {
            "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "name": self._heartbeats_name,
            "scheduling_strategy": on_this_node(),
        }  # fmt: skip
        self._tickets = itertools.count(1)
        self._placement = Placement(spec, self._heartbeats_name)
        self._heartbeats = ray.remote(Heartbeats).options(**options).remote()
        try:
            for number, home in enumerate(spec.engines.homes(languages), start=1):
                self.replicas.append(Replica(number, home, self._placement.start(number)))
            self._drive_until(lambda: len(self._with(Health.HEALTHY)) >= self._settings.min_engines)
        except BaseException:
            self.close()
            raise

    def _with(self, *health: Health) -> list[Replica]:
        return [replica for replica in self.replicas if replica.health in health]

    def refresh(self, policy: Policy) -> None:
        """Switches to this policy: each engine loads it before its next request, without restarting."""
        if policy == self.policy:
            return
        self.policy = policy
        for replica in self._with(Health.HEALTHY, Health.SUSPECT):
            replica.becomes(Health.STALE)

    def wait_for_all(self) -> None:
        """Blocks until every engine that is not retired can serve."""
        self._drive_until(lambda: not self._with(Health.STARTING, Health.STALE, Health.SUSPECT, Health.DEAD))

    def run(self, request: ChunkRequest[Any, Any], work: Dispatcher) -> Iterator[tuple[ChunkTask, Counts]]:
        """Spreads chunks over the engines; yields each finished one with its counts.

        Raises CalmRayError if fewer than `min_engines` are left, and for errors that another engine would not fix.
        """
        started, self.refresh_seconds = time.monotonic(), 0.0
        is_refreshing = bool(self._with(Health.STALE))
        while not work.is_done:
            for replica in self._with(Health.HEALTHY):
                if replica.call is None and (task := work.next(replica.home)) is not None:
                    task = replace(task, ticket=next(self._tickets))
                    replica.track(replica.engine.serve(task, request), task)
            yield from self._poll(work)
            if is_refreshing:
                self.refresh_seconds = time.monotonic() - started
                is_refreshing = bool(self._with(Health.STALE))

    def _drive_until(self, is_done: Callable[[], bool]) -> None:
        nothing, since = Dispatcher([], 0), time.monotonic()
        while not is_done():
            for _ in self._poll(nothing):
                pass
            if time.monotonic() - since > WAIT_SECONDS:
                self._report_waiting()

    def _poll(self, work: Dispatcher) -> Iterator[tuple[ChunkTask, Counts]]:
        """Waits up to POLL_SECONDS for a call to finish, then checks on every engine."""
        for replica in self.replicas:
            if replica.call is None and replica.health is Health.STALE:
                replica.track(replica.engine.load(self.policy))
            elif replica.call is None and replica.health is Health.STARTING and replica.may_retry:
                replica.track(replica.engine.ready())
        calls = {replica.call: replica for replica in self.replicas if replica.call is not None}
        if not calls:
            time.sleep(POLL_SECONDS)
        done, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS) if calls else ([], [])
        for call in done:
            yield from self._handle_result(calls[call], call, work)
        self._monitor(work)

    def _handle_result(
        self, replica: Replica, call: ray.ObjectRef[Any], work: Dispatcher
    ) -> Iterator[tuple[ChunkTask, Counts]]:
        task, replica.call, replica.task = replica.task, None, None
        try:
            result = ray.get(call)
        except RayError as error:
            self._handle_failure(replica, task, error, work)
            return
        if replica.health is Health.STARTING:
            replica.has_run = True
            replica.starts = self._starts().get(replica.number, 0)
            replica.becomes(Health.STALE)
        elif task is None and replica.health is Health.STALE:
            if result == self.policy.name:
                replica.becomes(Health.HEALTHY)
        elif task is not None:
            replica.deaths = 0
            if work.finished(task):
                yield task, result

    def _handle_failure(self, replica: Replica, task: ChunkTask | None, error: RayError, work: Dispatcher) -> None:
        """Raises if no engine could serve the call, otherwise treats the engine as dead."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if module := missing_module(error):
            raise CalmRayError(
                f"{replica.name} cannot import {module}: a plug-in must be installed on every node, or be in the "
                "job's working directory"
            ) from error
        if replica.health is Health.STARTING and isinstance(error, ActorUnavailableError):
            return  # still starting
        init_failed = isinstance(error, RayActorError) and error.actor_init_failed
        starts = self._starts()
        replica.has_failed |= init_failed
        if init_failed and all_failed_to_start(self.replicas, starts):
            raise CalmRayError(
                f"{replica.name} did not start: {reason_of(error)}\n{remote_traceback(error)}"
            ) from error
        # An engine that Ray reports as unavailable may only be unreachable, and still working on its chunk.
        is_dead = isinstance(error, ActorDiedError) or bool(replica.starts_since(starts))
        kill = not (isinstance(error, RayActorError) and is_dead)
        node = ray.get(self._heartbeats.node_of_ticket.remote(task.ticket)) if task is not None else None
        self._recover(replica, task, work, reason_of(error), kill=kill, is_innocent=is_node_lost(error, node))
        if init_failed and replica.health is Health.STARTING:  # Ray does not restart after a failed __init__
            replica.engine, replica.starts = self._placement.start(replica.number), starts.get(replica.number, 0)

    def _recover(
        self, replica: Replica, task: ChunkTask | None, work: Dispatcher, why: str, *, kill: bool,
        is_innocent: bool = False,
    ) -> None:  # fmt: skip
        """Reports a dead engine's chunk to the dispatcher; restarts the engine, or retires it after too many deaths."""
        replica.becomes(Health.DEAD)
        replica.call = replica.task = None
        replica.deaths += 1
        known_bad = len(work.bad)
        if task is not None and (is_innocent or not ray.get(self._heartbeats.has_started.remote(task.ticket))):
            work.requeue(task)  # the engine died before starting on it, or with its node
        elif task is not None and work.died(task, why):
            replica.deaths -= 1
        if len(work.bad) > known_bad:
            bad = work.bad[-1]
            self._say(f"bad prompt: {bad.question_id} in {bad.language} crashes every engine; skipping it")
            for one in self.replicas:
                one.deaths = 0
        if replica.deaths > self._settings.max_restarts:
            self._retire(replica, why)
            return
        doing = f" on {task.name}" if task is not None else ""
        self._say(f"{replica.name} died{doing}: {why}; restarting it")
        if kill:
            self._restart(replica)
        replica.becomes(Health.STARTING)
        replica.since = time.monotonic()

    def _restart(self, replica: Replica) -> None:
        """Kills the process; Ray restarts it."""
        replica.engine.restart()
        replica.starts, replica.call, replica.since = self._starts().get(replica.number, 0), None, time.monotonic()

    def _retire(self, replica: Replica, why: object) -> None:
        replica.becomes(Health.RETIRED)
        replica.call = replica.task = None
        replica.engine.stop()
        left = len(self.replicas) - len(self._with(Health.RETIRED))
        self._say(f"retired {replica.name} after {replica.deaths} deaths without a success: {why}; {left} left")
        if left < self._settings.min_engines:
            raise CalmRayError(
                f"{left} engines left, fewer than engines.min_engines ({self._settings.min_engines}); the last one "
                f"died: {why}\nFinished chunks are kept; rerun the same command to resume."
            )

    def _monitor(self, work: Dispatcher) -> None:
        """Restarts engines that hang; reports what the pool waits for if none can work."""
        reads = [self._heartbeats.silence, self._heartbeats.starts, self._heartbeats.ages]
        silence, starts, ages = ray.get([read.remote() for read in reads])
        now, settings = time.monotonic(), self._settings
        for replica in self._with(Health.STARTING):
            tries = replica.starts_since(starts)
            if tries > settings.max_restarts + 1:
                replica.becomes(Health.DEAD)
                self._retire(replica, "it does not start")
            elif tries and ages.get(replica.number, 0.0) > settings.chunk_timeout_s:
                self._recover(replica, replica.task, work, f"not up after {settings.chunk_timeout_s:g} s", kill=True)
        for replica in self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE):
            silent = silence.get(replica.number, 0.0)
            if replica.call is not None and now - replica.since > settings.chunk_timeout_s:
                self._recover(replica, replica.task, work, f"timed out after {settings.chunk_timeout_s:g} s", kill=True)
            elif silent > settings.heartbeat_timeout_s:
                self._recover(replica, replica.task, work, f"no heartbeat for {silent:.0f} s", kill=True)
            elif silent > settings.heartbeat_timeout_s / 2 and replica.health is Health.HEALTHY:
                replica.becomes(Health.SUSPECT)
                self._say(f"{replica.name} is suspect: no heartbeat for {silent:.0f} s")
            elif silent <= settings.heartbeat_timeout_s / 2 and replica.health is Health.SUSPECT:
                replica.becomes(Health.HEALTHY)
        if not self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE):
            self._report_waiting()

    def _report_waiting(self) -> None:
        """Logs at most one line per WAIT_SECONDS."""
        if time.monotonic() - self._last_report <= WAIT_SECONDS:
            return
        self._last_report = time.monotonic()
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.spec.needs.items() if amount)
        count, stale = len(self._with(Health.STARTING)), len(self._with(Health.STALE))
        behind = f", {stale} to load the policy" if stale else ""
        needs = f"{count} to start, each needs {wanted} on one node"
        self._say(f"waiting for engines: {needs}{behind}; {free_resources()}")

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Frees the engines' GPU memory while the block runs (`placement: colocate`)."""
        since = time.monotonic()
        self._drive_until(lambda: not self._loading() or time.monotonic() - since > WAIT_SECONDS)
        ray.get(self._heartbeats.set_paused.remote(True))
        for replica in self._loading():
            self._restart(replica)  # it then waits in __init__ until the others wake
        self._call_all(EngineHandle.sleep)
        try:
            yield
        finally:
            self._call_all(EngineHandle.wake)
            ray.get(self._heartbeats.set_paused.remote(False))

    def _loading(self) -> list[Replica]:
        """Engines whose process has started but is not up yet."""
        starts = self._starts()
        return [replica for replica in self._with(Health.STARTING) if replica.starts_since(starts)]

    def _call_all(self, call: Callable[[EngineHandle], ray.ObjectRef[None]]) -> None:
        running = self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE)
        calls = {call(replica.engine): replica for replica in running}
        timeout = self._settings.heartbeat_timeout_s
        done = ray.wait(list(calls), num_returns=len(calls), timeout=timeout)[0] if calls else []
        for one, replica in calls.items():
            try:
                ray.get(one, timeout=None if one in done else 0)
            except RayError as error:
                self._recover(replica, None, Dispatcher([], 0), reason_of(error), kill=True)

    @property
    def text_service(self) -> TextService:
        """The engines as a text generation service, for Ray Data tasks and translators.

        Waits for starting engines as long as one comes up every WAIT_SECONDS, except those it gave up on before.
        """
        patience = Patience(WAIT_SECONDS, self._late, time.monotonic())

        def coming() -> set[int]:
            return {replica.number for replica in self._with(Health.STARTING, Health.STALE)}

        for _ in self._poll(Dispatcher([], 0)) if self._late else ():
            pass  # some may be up by now
        self._drive_until(lambda: patience.is_over(len(self._with(Health.HEALTHY)), coming(), time.monotonic()))
        self._late = coming()
        engines = [replica.engine for replica in self._with(Health.HEALTHY)]
        settings = self._settings
        return TextService(
            engines, self.policy, self._heartbeats, settings.chunk_timeout_s, settings.heartbeat_timeout_s
        )

    @property
    def starts(self) -> int:
        """Total number of engine starts."""
        return sum(self._starts().values())

    def _starts(self) -> dict[int, int]:
        return dict(ray.get(self._heartbeats.starts.remote()))

    def states(self) -> Counter[Health]:
        return Counter(replica.health for replica in self.replicas)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for replica in self.replicas:
            replica.engine.stop()
        self._placement.close()
        ray.kill(self._heartbeats)
        self.replicas = []
