"""The engines as writers of texts: what carries completions over into other languages, wherever that happens."""

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
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from calm_ray.core.errors import CalmRayError
from calm_ray.engines.replica import is_machine_lost
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
class Part:
    """Messages that one engine is given together."""

    numbers: tuple[int, ...]
    deaths: int = 0

    def again(self) -> list[Part]:
        """What is tried after an engine has died under it: itself, then its halves; at last nothing."""
        count = len(self.numbers)
        if self.deaths + 1 < (TRIES if count > 1 else TRIES_ALONE):
            return [replace(self, deaths=self.deaths + 1)]
        return [Part(self.numbers[: count // 2]), Part(self.numbers[count // 2 :])] if count > 1 else []


class Desk:
    """Which engine writes what: each has one part at a time. Knows nothing of Ray."""

    def __init__(self, messages: int, engines: int) -> None:
        size = max(1, min(MOST_MESSAGES, math.ceil(messages / engines)))
        numbers = range(messages)
        self.parts = deque(Part(tuple(numbers[first : first + size])) for first in range(0, messages, size))
        self._free = [(0.0, engine) for engine in range(engines)]  # a heap: from when on, and who

    def next(self, now: float) -> tuple[Part, int] | None:
        """A part, and the engine that shall write it; None where nothing is left to give or nobody is free."""
        if not self.parts or not self._free or self._free[0][0] > now:
            return None
        return self.parts.popleft(), heapq.heappop(self._free)[1]

    def written(self, engine: int, now: float) -> None:
        heapq.heappush(self._free, (now, engine))

    def not_begun(self, part: Part, engine: int, now: float) -> None:
        """The engine was just being started, or its machine was lost: that says nothing about the messages."""
        self.parts.append(part)
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))

    def died(self, part: Part, engine: int, now: float) -> None:
        self.parts.extend(part.again())
        heapq.heappush(self._free, (now + RETRY_SECONDS, engine))


@dataclass
class _Given:
    """A part that an engine has been given."""

    part: Part
    engine: int
    ticket: int
    since: float
    """When it was given, or first seen to be begun."""
    has_begun: bool = False


@dataclass(frozen=True)
class Writers:
    """Picklable: a Ray Data task has the engines write for it. Engines that die are started again by Ray meanwhile."""

    engines: list[ActorHandle[Any]]
    policy: Policy
    """By whom."""
    pulse: ActorHandle[Any]
    """Where engines note what they have begun."""
    seconds: float
    """An engine that takes longer for its part is taken for dead; all of them, where none writes for so long."""
    silent_seconds: float
    """The same where an engine shows no sign of life for so long."""

    def __call__(self, messages: Sequence[str], max_new_tokens: int) -> list[str | None]:
        """The policy's greedy reply to each message; None where several engines died of it and none has replied.

        Raises CalmRayError where no engine can write any more.
        """
        replies: list[str | None] = [None] * len(messages)
        desk = Desk(len(messages), len(self.engines))
        given: dict[ray.ObjectRef[Any], _Given] = {}
        heard = looked = time.monotonic()
        while desk.parts or given:
            while (job := desk.next(time.monotonic())) is not None:
                part, engine = job
                ticket, asked = uuid.uuid4().int >> 65, [messages[number] for number in part.numbers]
                call = self.engines[engine].write.remote(asked, max_new_tokens, self.policy, ticket)
                given[call] = _Given(part, engine, ticket, time.monotonic())
            done = ray.wait(list(given), num_returns=1, timeout=RETRY_SECONDS)[0] if given else []
            if not given:
                time.sleep(RETRY_SECONDS)
            for call in done:
                one = given.pop(call)
                if self._ended(call, one, replies, desk):
                    heard = time.monotonic()
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if self._look_after(given, desk):
                    heard = looked
            if time.monotonic() - heard > self.seconds:
                raise CalmRayError(f"no engine has written anything for {self.seconds:g} s; the same command goes on")
        return replies

    def _ended(self, call: ray.ObjectRef[Any], one: _Given, replies: list[str | None], desk: Desk) -> bool:
        """Takes the replies of a call that has ended; returns whether its engine had begun."""
        try:
            for number, reply in zip(one.part.numbers, ray.get(call), strict=True):
                replies[number] = reply
        except RayError as error:
            self._check(error, one.engine)
            has_begun, node = ray.get([ask.remote(one.ticket) for ask in (self.pulse.has_begun, self.pulse.node_under)])
            if has_begun and not is_machine_lost(error, node):
                desk.died(one.part, one.engine, time.monotonic())
            else:
                desk.not_begun(one.part, one.engine, time.monotonic())
            return bool(has_begun)
        desk.written(one.engine, time.monotonic())
        return True

    def _check(self, error: RayError, engine: int) -> None:
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if isinstance(error, RayTaskError):
            ray.kill(self.engines[engine], no_restart=False)
        elif not isinstance(error, RayActorError):
            raise CalmRayError(f"an engine failed: {error}; the same command goes on") from error

    def _look_after(self, given: dict[ray.ObjectRef[Any], _Given], desk: Desk) -> bool:
        """Ends engines that hang at their part; a part that waits too long for its turn is given to another one.

        Returns whether any part has been begun.
        """
        silences = ray.get([self.pulse.silence_under.remote(one.ticket) for one in given.values()])
        now = time.monotonic()
        for (call, one), silence in zip(list(given.items()), silences, strict=True):
            if silence is not None and not one.has_begun:
                one.has_begun, one.since = True, now
            is_late = now - one.since > self.seconds
            if silence is not None and (is_late or silence > self.silent_seconds):
                ray.kill(self.engines[one.engine], no_restart=False)
                desk.died(one.part, one.engine, now)
                del given[call]
            elif silence is None and is_late:  # the engine writes for others
                desk.not_begun(one.part, one.engine, now)
                del given[call]
        return any(silence is not None for silence in silences)
