"""The engines as writers of texts: what carries completions over into other languages, wherever that happens."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from calm_ray.errors import CalmRayError
from calm_ray.policies import Policy

RETRY_SECONDS = 1.0
TRIES = 2
"""Engines that may die under some messages before these are tried in halves."""


@dataclass(frozen=True)
class _Part:
    """Messages that one engine is given together."""

    numbers: tuple[int, ...]
    deaths: int = 0

    def again(self) -> list[_Part]:
        """What is tried after an engine has died under it: itself, then its halves; a message by itself no more."""
        if self.deaths + 1 < TRIES:
            return [replace(self, deaths=self.deaths + 1)]
        middle = len(self.numbers) // 2
        return [_Part(half) for half in (self.numbers[:middle], self.numbers[middle:]) if half] if middle else []


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

    def __call__(self, messages: Sequence[str], max_new_tokens: int) -> list[str]:
        """The policy's greedy reply to each message; an empty one where engines die of it.

        Raises CalmRayError where no engine can write any more.
        """
        replies = [""] * len(messages)
        count = len(self.engines)
        parts = deque(_Part(tuple(range(number, len(messages), count))) for number in range(count))
        turn, last_begun = 0, time.monotonic()
        while parts:
            given = []
            for _ in range(min(count, len(parts))):
                part, engine, ticket = parts.popleft(), self.engines[turn % count], uuid.uuid4().int >> 65
                turn += 1
                asked = [messages[number] for number in part.numbers]
                given.append((part, engine, ticket, engine.write.remote(asked, max_new_tokens, self.policy, ticket)))
            for part, engine, ticket, call in given:
                try:
                    for number, reply in zip(part.numbers, ray.get(call, timeout=self.seconds), strict=True):
                        replies[number] = reply
                    last_begun = time.monotonic()
                except RayError as error:
                    self._end(engine, error)
                    if ray.get(self.pulse.has_begun.remote(ticket)):
                        parts.extend(part.again())
                        last_begun = time.monotonic()
                    else:  # the engine is just being started again
                        parts.append(part)
                        time.sleep(RETRY_SECONDS)
            if time.monotonic() - last_begun > self.seconds:
                raise CalmRayError(f"no engine has written anything for {self.seconds:g} s; the same command goes on")
        return replies

    def _end(self, engine: ActorHandle[Any], error: RayError) -> None:
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if isinstance(error, GetTimeoutError | RayTaskError):
            ray.kill(engine, no_restart=False)
        elif not isinstance(error, RayActorError):
            raise CalmRayError(f"an engine failed: {error}; the same command goes on") from error
