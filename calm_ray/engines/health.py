"""How an engine is: the states of the pool's engines, and what leads from one to the next."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    RESTARTING = "starting"
    """Waits for resources, or loads the model: at first, and again after it died."""
    STALE = "stale"
    """Runs, with a policy that is not the current one."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Has shown no sign of life for a while; gets nothing new."""
    DEAD = "dead"
    RETIRED = "retired"
    """Died too often; is not started again."""


NEXT: dict[Health, frozenset[Health]] = {
    Health.RESTARTING: frozenset({Health.STALE, Health.DEAD}),
    Health.STALE: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.HEALTHY: frozenset({Health.STALE, Health.SUSPECT, Health.DEAD}),
    Health.SUSPECT: frozenset({Health.HEALTHY, Health.STALE, Health.DEAD}),
    Health.DEAD: frozenset({Health.RESTARTING, Health.RETIRED}),
    Health.RETIRED: frozenset(),
}


@dataclass
class Patience:
    """How long engines that start are waited for: as long as one comes up every `seconds`."""

    seconds: float
    late: Collection[int]
    """Engines that were waited for in vain before, and are not again."""
    since: float
    up: int = 0

    def is_over(self, up: int, coming: Collection[int], now: float) -> bool:
        """Whether to begin with the `up` engines there are, if any, and not wait for those that are `coming`."""
        if up > self.up:
            self.up, self.since = up, now
        return up > 0 and (now - self.since > self.seconds or set(coming) <= set(self.late))


class Heartbeats:
    """Where engines show that they live; the pool reads it. A Ray actor of its own, so that no engine is waited for.

    A sign of life is a beat of an engine that has nothing to compute, or has computed something since the beat before.
    Should this actor die, it starts with nothing: what it must know of engines that run comes back with their beats.
    """

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._signs: dict[int, float] = {}
        self._starts: dict[int, int] = {}
        self._began: dict[int, float] = {}
        self._nodes: dict[int, str] = {}
        self._begun: dict[int, tuple[int, str | None]] = {}
        self._is_paused: bool | None = None  # until it is set, or an engine is seen asleep

    def started(self, engine: int, node: str) -> None:
        """An engine's process begins, on this node."""
        self._starts[engine] = self._starts.get(engine, 0) + 1
        self._nodes[engine] = node
        self._steps[engine] = -1
        self._signs[engine] = self._began[engine] = time.monotonic()

    def beat(self, engine: int, steps: int, at_work: bool, is_asleep: bool) -> None:
        if not at_work or steps != self._steps.get(engine):
            self._signs[engine] = time.monotonic()
        self._steps[engine] = steps
        self._starts.setdefault(engine, 1)
        self._began.setdefault(engine, time.monotonic())
        if self._is_paused is None and is_asleep:
            self._is_paused = True

    def begins(self, ticket: int, engine: int) -> None:
        """An engine begins with what was given out with this ticket."""
        self._begun[ticket] = engine, self._nodes.get(engine)

    def has_begun(self, ticket: int) -> bool:
        return ticket in self._begun

    def silence_under(self, ticket: int) -> float | None:
        """Seconds since the last sign of life of the engine that has begun with this ticket; None where none has."""
        if ticket not in self._begun:
            return None
        engine, _ = self._begun[ticket]
        return time.monotonic() - self._signs.get(engine, time.monotonic())

    def node_under(self, ticket: int) -> str | None:
        """Where an engine has begun with this ticket, if that is known."""
        _, node = self._begun.get(ticket, (0, None))
        return node

    def set_paused(self, is_paused: bool) -> None:
        """Engines sleep; those that start meanwhile wait until the GPUs are theirs again."""
        self._is_paused = is_paused
        if not is_paused:  # who has waited begins now
            self._began = dict.fromkeys(self._began, time.monotonic())

    def is_paused(self) -> bool:
        return bool(self._is_paused)

    def silence(self) -> dict[int, float]:
        """Seconds since the last sign of life of each engine that has begun."""
        now = time.monotonic()
        return {engine: now - sign for engine, sign in self._signs.items()}

    def ages(self) -> dict[int, float]:
        """Seconds since the process of each engine began."""
        now = time.monotonic()
        return {engine: now - began for engine, began in self._began.items()}

    def starts(self) -> dict[int, int]:
        """How often each engine was started."""
        return dict(self._starts)
