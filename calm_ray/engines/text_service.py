"""The engines as a service that writes texts: what carries completions over into other languages, wherever it runs."""

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
from calm_ray.engines.replica import EngineHandle, is_machine_lost
from calm_ray.engines.requests import Write
from calm_ray.run.policies import Policy

RETRY_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How often engines are looked after that are at work."""
MOST_MESSAGES = 64
"""Messages that an engine is given together."""
TRIES = 2
"""Engines that may die under some messages before these are tried in halves."""
TRIES_ALONE = 5
"""Engines that may die under a message by itself before it is left without a reply."""


@dataclass(frozen=True)
class Batch:
    """Messages that one engine is given together."""

    numbers: tuple[int, ...]
    deaths: int = 0

    def again(self) -> list[Batch]:
        """What is tried after an engine has died under it: itself, then its halves; at last nothing."""
        count = len(self.numbers)
        if self.deaths + 1 < (TRIES if count > 1 else TRIES_ALONE):
            return [replace(self, deaths=self.deaths + 1)]
        return [Batch(self.numbers[: count // 2]), Batch(self.numbers[count // 2 :])] if count > 1 else []


class BatchQueue:
    """Which engine writes what: each has one batch at a time. Knows nothing of Ray."""

    def __init__(self, messages: int, engines: int) -> None:
        size = max(1, min(MOST_MESSAGES, math.ceil(messages / engines)))
        numbers = range(messages)
        self.batches = deque(Batch(tuple(numbers[first : first + size])) for first in range(0, messages, size))
        self._free = [(0.0, engine) for engine in range(engines)]  # a heap: from when on, and who

    def next(self, now: float) -> tuple[Batch, int] | None:
        """A batch, and the engine that shall write it; None where nothing is left to give or nobody is free."""
        if not self.batches or not self._free or self._free[0][0] > now:
            return None
        return self.batches.popleft(), heapq.heappop(self._free)[1]

    def written(self, engine: int, now: float) -> None:
        heapq.heappush(self._free, (now, engine))

    def requeue(self, batch: Batch, engine: int, now: float) -> None:
        """The engine was just being started, or its machine was lost: that says nothing about the messages."""
        self.batches.append(batch)
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))

    def died(self, batch: Batch, engine: int, now: float) -> None:
        self.batches.extend(batch.again())
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))


@dataclass
class _Given:
    """A batch that an engine has been given."""

    batch: Batch
    engine: int
    ticket: int
    since: float
    """When it was given, or first seen to be begun."""
    has_begun: bool = False


@dataclass(frozen=True)
class TextService:
    """Picklable: a Ray Data task has the engines write for it. Engines that die are started again by Ray meanwhile."""

    engines: list[EngineHandle]
    policy: Policy
    """The policy the engines must serve."""
    heartbeats: Any
    """The actor `calm_ray.engines.health.Heartbeats`, where engines note what they have begun."""
    seconds: float
    """An engine that takes longer for its batch is taken for dead; all of them, where none writes for so long."""
    silent_seconds: float
    """The same where an engine shows no sign of life for so long."""

    def __call__(self, messages: Sequence[str], max_new_tokens: int) -> list[str | None]:
        """The policy's greedy reply to each message; None where several engines died of it and none has replied.

        Raises CalmRayError where no engine can write any more.
        """
        replies: list[str | None] = [None] * len(messages)
        queue = BatchQueue(len(messages), len(self.engines))
        given: dict[ray.ObjectRef[Any], _Given] = {}
        heard = looked = time.monotonic()
        while queue.batches or given:
            while (job := queue.next(time.monotonic())) is not None:
                batch, engine = job
                ticket = uuid.uuid4().int >> 65
                request = Write(tuple(messages[number] for number in batch.numbers), max_new_tokens)
                call = self.engines[engine].write(request, self.policy, ticket)
                given[call] = _Given(batch, engine, ticket, time.monotonic())
            done = ray.wait(list(given), num_returns=1, timeout=RETRY_SECONDS)[0] if given else []
            if not given:
                time.sleep(RETRY_SECONDS)
            for call in done:
                one = given.pop(call)
                if self._ended(call, one, replies, queue):
                    heard = time.monotonic()
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if self._look_after(given, queue):
                    heard = looked
            if time.monotonic() - heard > self.seconds:
                raise CalmRayError(f"no engine has written anything for {self.seconds:g} s; the same command goes on")
        return replies

    def _ended(self, call: ray.ObjectRef[Any], one: _Given, replies: list[str | None], queue: BatchQueue) -> bool:
        """Takes the replies of a call that has ended; returns whether its engine had begun."""
        try:
            for number, reply in zip(one.batch.numbers, ray.get(call), strict=True):
                replies[number] = reply
        except RayError as error:
            self._check(error, one.engine)
            asked = self.heartbeats.has_begun.remote(one.ticket), self.heartbeats.node_under.remote(one.ticket)
            has_begun, node = ray.get(list(asked))
            if has_begun and not is_machine_lost(error, node):
                queue.died(one.batch, one.engine, time.monotonic())
            else:
                queue.requeue(one.batch, one.engine, time.monotonic())
            return bool(has_begun)
        queue.written(one.engine, time.monotonic())
        return True

    def _check(self, error: RayError, engine: int) -> None:
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if isinstance(error, RayTaskError):
            self.engines[engine].restart()
        elif not isinstance(error, RayActorError):
            raise CalmRayError(f"an engine failed: {error}; the same command goes on") from error

    def _look_after(self, given: dict[ray.ObjectRef[Any], _Given], queue: BatchQueue) -> bool:
        """Ends engines that hang at their batch; a batch that waits too long for its turn is given to another one.

        Returns whether any batch has been begun.
        """
        silences = ray.get([self.heartbeats.silence_under.remote(one.ticket) for one in given.values()])
        now = time.monotonic()
        for (call, one), silence in zip(list(given.items()), silences, strict=True):
            if silence is not None and not one.has_begun:
                one.has_begun, one.since = True, now
            is_late = now - one.since > self.seconds
            if silence is not None and (is_late or silence > self.silent_seconds):
                self.engines[one.engine].restart()
                queue.died(one.batch, one.engine, now)
                del given[call]
            elif silence is None and is_late:  # the engine writes for others
                queue.requeue(one.batch, one.engine, now)
                del given[call]
        return any(silence is not None for silence in silences)
