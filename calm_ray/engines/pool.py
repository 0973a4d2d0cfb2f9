"""The engine pool: a pool of warm actors for each language, or one that all languages share, and their health.

Engines are started once and stay warm until the pool is closed. One that dies, hangs or is lost with its machine is
started again by Ray, elsewhere if need be, and serves only after it has taken the current policy.
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
    is_machine_lost,
    missing_module,
    none_will_start,
    reason_of,
    remote_traceback,
)
from calm_ray.engines.requests import ChunkRequest, Counts
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.text_service import TextService
from calm_ray.run.policies import Policy


class EnginePool:
    """Each engine has a home language (None where engines are shared). One without work at home takes chunks of the
    language that has most left: the weights are the same.
    """

    def __init__(self, spec: EngineSpec, languages: list[str], say: Callable[[str], None]) -> None:
        self.spec, self._say = spec, say
        self._settings = spec.engines
        self.policy = Policy()
        self.refresh_seconds = 0.0
        """Of the last `run`: until every engine had taken the policy that was new; others may have served meanwhile."""
        self.replicas: list[Replica] = []
        self._late: set[int] = set()  # engines that a text service has waited for in vain
        self._said = time.monotonic()
        # By name: an engine that is started again must not depend on a reference that may be lost meanwhile.
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
        """From now on the engines serve this policy: each loads it before its next request, while it runs."""
        if policy == self.policy:
            return
        self.policy = policy
        for replica in self._with(Health.HEALTHY, Health.SUSPECT):
            replica.becomes(Health.STALE)

    def wait_for_all(self) -> None:
        """Until every engine that was not given up can serve."""
        self._drive_until(lambda: not self._with(Health.RESTARTING, Health.STALE, Health.SUSPECT, Health.DEAD))

    def run(self, request: ChunkRequest[Any, Any], work: Dispatcher) -> Iterator[tuple[ChunkTask, Counts]]:
        """Spreads chunks over the engines; yields each with the engine's counts as it is finished.

        Raises CalmRayError where fewer than `min_engines` are left, and for what no other engine could do better.
        """
        started, self.refresh_seconds = time.monotonic(), 0.0
        is_refreshing = bool(self._with(Health.STALE))
        while not work.is_done:
            for replica in self._with(Health.HEALTHY):
                if replica.call is None and (task := work.next(replica.home)) is not None:
                    task = replace(task, ticket=next(self._tickets))
                    replica.calls(replica.engine.serve(task, request), task)
            yield from self._turn(work)
            if is_refreshing:
                self.refresh_seconds = time.monotonic() - started
                is_refreshing = bool(self._with(Health.STALE))

    def _drive_until(self, is_done: Callable[[], bool]) -> None:
        nothing, since = Dispatcher([], 0), time.monotonic()
        while not is_done():
            for _ in self._turn(nothing):
                pass
            if time.monotonic() - since > WAIT_SECONDS:
                self._say_what_is_waited_for()

    def _turn(self, work: Dispatcher) -> Iterator[tuple[ChunkTask, Counts]]:
        """Waits for whatever ends first, a second at most, and looks after every engine."""
        for replica in self.replicas:
            if replica.call is None and replica.health is Health.STALE:
                replica.calls(replica.engine.load(self.policy))
            elif replica.call is None and replica.health is Health.RESTARTING and replica.is_rested:
                replica.calls(replica.engine.ready())
        calls = {replica.call: replica for replica in self.replicas if replica.call is not None}
        if not calls:
            time.sleep(POLL_SECONDS)
        done, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS) if calls else ([], [])
        for call in done:
            yield from self._ended(calls[call], call, work)
        self._look_after(work)

    def _ended(
        self, replica: Replica, call: ray.ObjectRef[Any], work: Dispatcher
    ) -> Iterator[tuple[ChunkTask, Counts]]:
        task, replica.call, replica.task = replica.task, None, None
        try:
            result = ray.get(call)
        except RayError as error:
            self._failed(replica, task, error, work)
            return
        if replica.health is Health.RESTARTING:
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

    def _failed(self, replica: Replica, task: ChunkTask | None, error: RayError, work: Dispatcher) -> None:
        """What a call that raised means: bad input, which no engine can mend, or the end of the engine."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if module := missing_module(error):
            raise CalmRayError(
                f"{replica.name} cannot import {module}: a plug-in must be installed on every node, or lie in the "
                "job's working directory"
            ) from error
        if replica.health is Health.RESTARTING and isinstance(error, ActorUnavailableError):
            return  # not yet
        is_lost = isinstance(error, RayActorError) and error.actor_init_failed
        starts = self._starts()
        replica.has_failed |= is_lost
        if is_lost and none_will_start(self.replicas, starts):
            raise CalmRayError(
                f"{replica.name} did not start: {reason_of(error)}\n{remote_traceback(error)}"
            ) from error
        # Ray calls "unavailable" what died and what is only out of reach, which might go on with its chunk.
        is_dead = isinstance(error, ActorDiedError) or bool(replica.starts_since(starts))
        kill = not (isinstance(error, RayActorError) and is_dead)
        node = ray.get(self._heartbeats.node_under.remote(task.ticket)) if task is not None else None
        self._end(replica, task, work, reason_of(error), kill=kill, is_innocent=is_machine_lost(error, node))
        if is_lost and replica.health is Health.RESTARTING:  # Ray does not start such a one again
            replica.engine, replica.starts = self._placement.start(replica.number), starts.get(replica.number, 0)

    def _end(
        self, replica: Replica, task: ChunkTask | None, work: Dispatcher, why: str, *, kill: bool,
        is_innocent: bool = False,
    ) -> None:  # fmt: skip
        """An engine is dead: its chunk goes to another one, and it is started again, unless it died too often."""
        replica.becomes(Health.DEAD)
        replica.call = replica.task = None
        replica.deaths += 1
        found = len(work.bad)
        if task is not None and (is_innocent or not ray.get(self._heartbeats.has_begun.remote(task.ticket))):
            work.requeue(task)  # it was dead already, or its machine is lost
        elif task is not None and work.died(task, why):
            replica.deaths -= 1
        if len(work.bad) > found:
            bad = work.bad[-1]
            self._say(f"bad prompt: {bad.question_id} in {bad.language} ends every engine and is left out")
            for one in self.replicas:
                one.deaths = 0
        if replica.deaths > self._settings.max_restarts:
            self._retire(replica, why)
            return
        doing = f" at {task.name}" if task is not None else ""
        self._say(f"{replica.name} died{doing}: {why}; it is started again")
        if kill:
            self._start_over(replica)
        replica.becomes(Health.RESTARTING)
        replica.since = time.monotonic()

    def _start_over(self, replica: Replica) -> None:
        """Ends its process; Ray starts it again."""
        replica.engine.restart()
        replica.starts, replica.call, replica.since = self._starts().get(replica.number, 0), None, time.monotonic()

    def _retire(self, replica: Replica, why: object) -> None:
        replica.becomes(Health.RETIRED)
        replica.call = replica.task = None
        replica.engine.stop()
        left = len(self.replicas) - len(self._with(Health.RETIRED))
        self._say(f"{replica.name} died {replica.deaths} times without finishing anything and is given up; {left} left")
        if left < self._settings.min_engines:
            raise CalmRayError(
                f"{left} engines are left, fewer than engines.min_engines ({self._settings.min_engines}); the last one "
                f"died of: {why}\nWhat was done is kept; the same command goes on."
            )

    def _look_after(self, work: Dispatcher) -> None:
        """Ends engines that hang; says what is waited for where none can work."""
        signs = [self._heartbeats.silence, self._heartbeats.starts, self._heartbeats.ages]
        silence, starts, ages = ray.get([sign.remote() for sign in signs])
        now, settings = time.monotonic(), self._settings
        for replica in self._with(Health.RESTARTING):
            tries = replica.starts_since(starts)
            if tries > settings.max_restarts + 1:
                replica.becomes(Health.DEAD)
                self._retire(replica, "it does not come up")
            elif tries and ages.get(replica.number, 0.0) > settings.chunk_seconds:
                self._end(replica, replica.task, work, f"not started after {settings.chunk_seconds:g} s", kill=True)
        for replica in self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE):
            silent = silence.get(replica.number, 0.0)
            if replica.call is not None and now - replica.since > settings.chunk_seconds:
                self._end(replica, replica.task, work, f"not done after {settings.chunk_seconds:g} s", kill=True)
            elif silent > settings.silent_seconds:
                self._end(replica, replica.task, work, f"no sign of life for {silent:.0f} s", kill=True)
            elif silent > settings.silent_seconds / 2 and replica.health is Health.HEALTHY:
                replica.becomes(Health.SUSPECT)
                self._say(f"{replica.name} is suspect: no sign of life for {silent:.0f} s")
            elif silent <= settings.silent_seconds / 2 and replica.health is Health.SUSPECT:
                replica.becomes(Health.HEALTHY)
        if not self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE):
            self._say_what_is_waited_for()

    def _say_what_is_waited_for(self) -> None:
        """A line, every WAIT_SECONDS at most."""
        if time.monotonic() - self._said <= WAIT_SECONDS:
            return
        self._said = time.monotonic()
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.spec.needs.items() if amount)
        count, stale = len(self._with(Health.RESTARTING)), len(self._with(Health.STALE))
        behind = f", {stale} to take the policy" if stale else ""
        needs = f"{count} to start, each needs {wanted} on one node"
        self._say(f"waiting for engines: {needs}{behind}; {free_resources()}")

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The engines give back their GPUs' memory meanwhile (`placement: colocate`)."""
        since = time.monotonic()
        self._drive_until(lambda: not self._loading() or time.monotonic() - since > WAIT_SECONDS)
        ray.get(self._heartbeats.set_paused.remote(True))
        for replica in self._loading():
            self._start_over(replica)  # it then waits until the others wake
        self._tell_all(EngineHandle.sleep)
        try:
            yield
        finally:
            self._tell_all(EngineHandle.wake)
            ray.get(self._heartbeats.set_paused.remote(False))

    def _loading(self) -> list[Replica]:
        """Engines whose process has begun, but is not up."""
        starts = self._starts()
        return [replica for replica in self._with(Health.RESTARTING) if replica.starts_since(starts)]

    def _tell_all(self, call: Callable[[EngineHandle], ray.ObjectRef[None]]) -> None:
        running = self._with(Health.HEALTHY, Health.SUSPECT, Health.STALE)
        told = {call(replica.engine): replica for replica in running}
        done = ray.wait(list(told), num_returns=len(told), timeout=self._settings.silent_seconds)[0] if told else []
        for asked, replica in told.items():
            try:
                ray.get(asked, timeout=None if asked in done else 0)
            except RayError as error:
                self._end(replica, None, Dispatcher([], 0), reason_of(error), kill=True)

    @property
    def text_service(self) -> TextService:
        """The engines as a service that writes texts, for Ray Data's tasks and for translators.

        Engines that start are waited for, as long as one comes up every WAIT_SECONDS; later only those that came since.
        """
        patience = Patience(WAIT_SECONDS, self._late, time.monotonic())

        def coming() -> set[int]:
            return {replica.number for replica in self._with(Health.RESTARTING, Health.STALE)}

        for _ in self._turn(Dispatcher([], 0)) if self._late else ():
            pass  # some of them may be up by now
        self._drive_until(lambda: patience.is_over(len(self._with(Health.HEALTHY)), coming(), time.monotonic()))
        self._late = coming()
        engines = [replica.engine for replica in self._with(Health.HEALTHY)]
        return TextService(
            engines, self.policy, self._heartbeats, self._settings.chunk_seconds, self._settings.silent_seconds
        )

    @property
    def starts(self) -> int:
        """How often engines were started, all together."""
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
