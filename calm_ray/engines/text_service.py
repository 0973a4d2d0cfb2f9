"""The engines as a text generation service, callable from Ray Data tasks, for translating completions."""

from __future__ import annotations

import heapq
import math
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from calm_ray.core.errors import CalmRayError
from calm_ray.engines.replica import EngineHandle, is_node_lost
from calm_ray.engines.requests import Write
from calm_ray.run.policies import Policy

RETRY_SECONDS = 1.0
MONITOR_SECONDS = 5.0
"""Interval between checks for engines that hang."""
MAX_BATCH = 64
"""Maximum number of messages in a batch."""
TRIES = 2
"""Engine deaths under a batch before it is halved."""
MAX_DEATHS_ALONE = 5
"""Engine deaths under a single message before it is left without a reply."""


@dataclass(frozen=True)
class Batch:
    """Messages sent to one engine together."""

    numbers: tuple[int, ...]
    deaths: int = 0

    def again(self) -> list[Batch]:
        """Returns the batches to try after a death: the same one, then its halves, finally none."""
        count = len(self.numbers)
        if self.deaths + 1 < (TRIES if count > 1 else MAX_DEATHS_ALONE):
            return [replace(self, deaths=self.deaths + 1)]
        return [Batch(self.numbers[: count // 2]), Batch(self.numbers[count // 2 :])] if count > 1 else []


class BatchQueue:
    """Assigns batches to engines, one at a time to each. Independent of Ray."""

    def __init__(self, messages: int, engines: int) -> None:
        size = max(1, min(MAX_BATCH, math.ceil(messages / engines)))
        numbers = range(messages)
        self.batches = deque(Batch(tuple(numbers[first : first + size])) for first in range(0, messages, size))
        self._free = [(0.0, engine) for engine in range(engines)]  # heap of (free from, engine)

    def next(self, now: float) -> tuple[Batch, int] | None:
        """Returns a batch and an engine for it; None if no batch is queued or no engine is free."""
        if not self.batches or not self._free or self._free[0][0] > now:
            return None
        return self.batches.popleft(), heapq.heappop(self._free)[1]

    def written(self, engine: int, now: float) -> None:
        heapq.heappush(self._free, (now, engine))

    def requeue(self, batch: Batch, engine: int, now: float) -> None:
        """Retries a batch whose engine was starting or lost with its node, which is not the messages' fault."""
        self.batches.append(batch)
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))

    def died(self, batch: Batch, engine: int, now: float) -> None:
        self.batches.extend(batch.again())
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))


@dataclass
class _InFlight:
    """A batch that was sent to an engine."""

    batch: Batch
    engine: int
    ticket: int
    since: float
    """When it was sent, then when it was first seen to have started."""
    has_started: bool = False


@dataclass(frozen=True)
class TextService:
    """Generates text on the engines. Picklable, for Ray Data tasks. Ray restarts engines that die meanwhile."""

    engines: list[EngineHandle]
    policy: Policy
    """The policy the engines must serve."""
    heartbeats: Any
    """The `calm_ray.engines.health.Heartbeats` actor, which records what the engines have started on."""
    seconds: float
    """Restart an engine that takes longer for a batch; give up if all engines make no progress for that long."""
    heartbeat_timeout_s: float
    """Restart a busy engine after this many seconds without a heartbeat."""

    def __call__(self, messages: Sequence[str], max_new_tokens: int) -> list[str | None]:
        """Returns the policy's greedy reply to each message; None if it crashed several engines.

        Raises CalmRayError if no engine can reply any more.
        """
        replies: list[str | None] = [None] * len(messages)
        queue = BatchQueue(len(messages), len(self.engines))
        in_flight: dict[ray.ObjectRef[Any], _InFlight] = {}
        last_progress = last_check = time.monotonic()
        while queue.batches or in_flight:
            while (job := queue.next(time.monotonic())) is not None:
                batch, engine = job
                ticket = uuid.uuid4().int >> 65
                request = Write(tuple(messages[number] for number in batch.numbers), max_new_tokens)
                call = self.engines[engine].write(request, self.policy, ticket)
                in_flight[call] = _InFlight(batch, engine, ticket, time.monotonic())
            done = ray.wait(list(in_flight), num_returns=1, timeout=RETRY_SECONDS)[0] if in_flight else []
            if not in_flight:
                time.sleep(RETRY_SECONDS)
            for call in done:
                one = in_flight.pop(call)
                if self._handle_result(call, one, replies, queue):
                    last_progress = time.monotonic()
            if time.monotonic() - last_check > MONITOR_SECONDS:
                last_check = time.monotonic()
                if self._monitor(in_flight, queue):
                    last_progress = last_check
            if time.monotonic() - last_progress > self.seconds:
                raise CalmRayError(
                    f"no engine has made progress for {self.seconds:g} s; rerun the same command to resume"
                )
        return replies

    def _handle_result(
        self, call: ray.ObjectRef[Any], one: _InFlight, replies: list[str | None], queue: BatchQueue
    ) -> bool:
        """Stores the replies of a finished call; returns whether its engine had started on it."""
        try:
            for number, reply in zip(one.batch.numbers, ray.get(call), strict=True):
                replies[number] = reply
        except RayError as error:
            self._handle_error(error, one.engine)
            reads = self.heartbeats.has_started.remote(one.ticket), self.heartbeats.node_of_ticket.remote(one.ticket)
            has_started, node = ray.get(list(reads))
            if has_started and not is_node_lost(error, node):
                queue.died(one.batch, one.engine, time.monotonic())
            else:
                queue.requeue(one.batch, one.engine, time.monotonic())
            return bool(has_started)
        queue.written(one.engine, time.monotonic())
        return True

    def _handle_error(self, error: RayError, engine: int) -> None:
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if isinstance(error, RayTaskError):
            self.engines[engine].restart()
        elif not isinstance(error, RayActorError):
            raise CalmRayError(f"an engine failed: {error}; rerun the same command to resume") from error

    def _monitor(self, in_flight: dict[ray.ObjectRef[Any], _InFlight], queue: BatchQueue) -> bool:
        """Restarts engines that hang and requeues batches that wait too long for their turn.

        Returns whether any batch has been started.
        """
        silences = ray.get([self.heartbeats.silence_of_ticket.remote(one.ticket) for one in in_flight.values()])
        now = time.monotonic()
        for (call, one), silence in zip(list(in_flight.items()), silences, strict=True):
            if silence is not None and not one.has_started:
                one.has_started, one.since = True, now
            is_late = now - one.since > self.seconds
            if silence is not None and (is_late or silence > self.heartbeat_timeout_s):
                self.engines[one.engine].restart()
                queue.died(one.batch, one.engine, now)
                del in_flight[call]
            elif silence is None and is_late:  # the engine is busy with other callers
                queue.requeue(one.batch, one.engine, now)
                del in_flight[call]
        return any(silence is not None for silence in silences)
