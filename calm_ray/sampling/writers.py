"""The engines as writers of texts: what carries completions over into other languages, wherever that happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from calm_ray.errors import CalmRayError
from calm_ray.policies import Policy

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
    seconds: float
    """An engine that takes longer for its part is taken for dead."""

    def __call__(self, messages: Sequence[str], max_new_tokens: int) -> list[str]:
        """The policy's greedy reply to each message; an empty one where engines die of it.

        Raises CalmRayError where the engines cannot be started again.
        """
        replies = [""] * len(messages)
        count = len(self.engines)
        parts = deque(_Part(tuple(range(number, len(messages), count))) for number in range(count))
        turn = 0
        while parts:
            given = []
            for _ in range(min(count, len(parts))):
                part, engine = parts.popleft(), self.engines[turn % count]
                turn += 1
                asked = [messages[number] for number in part.numbers]
                given.append((part, engine, engine.write.remote(asked, max_new_tokens, self.policy)))
            for part, engine, call in given:
                try:
                    written = ray.get(call, timeout=self.seconds)
                except RayError as error:
                    self._end(engine, error)
                    parts.extend(part.again())
                    continue
                for number, reply in zip(part.numbers, written, strict=True):
                    replies[number] = reply
        return replies

    def _end(self, engine: ActorHandle[Any], error: RayError) -> None:
        if isinstance(error, RayTaskError) and isinstance(error.cause, CalmRayError):
            raise error.cause
        if isinstance(error, GetTimeoutError | RayTaskError):
            ray.kill(engine, no_restart=False)
        elif not isinstance(error, RayActorError):
            raise CalmRayError(f"an engine failed: {error}; the same command goes on") from error
