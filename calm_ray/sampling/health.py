"""How an engine is: the states of the pool's engines, and what leads from one to the next."""

from __future__ import annotations

import time
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


class Pulse:
    """Where engines show that they live; the pool reads it. A Ray actor of its own, so that no engine is waited for.

    A sign of life is a beat of an engine that has nothing to compute, or has computed something since the beat before.
    """

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._signs: dict[int, float] = {}
        self._starts: dict[int, int] = {}
        self._began: dict[int, float] = {}
        self._begun: set[int] = set()
        self._is_night = False

    def started(self, engine: int) -> None:
        """An engine's process begins."""
        self._starts[engine] = self._starts.get(engine, 0) + 1
        self._steps[engine] = -1
        self._signs[engine] = self._began[engine] = time.monotonic()

    def beat(self, engine: int, steps: int, at_work: bool) -> None:
        if not at_work or steps != self._steps.get(engine):
            self._signs[engine] = time.monotonic()
        self._steps[engine] = steps

    def begins(self, ticket: int) -> None:
        """An engine begins with what was given out with this ticket."""
        self._begun.add(ticket)

    def has_begun(self, ticket: int) -> bool:
        return ticket in self._begun

    def set_night(self, is_night: bool) -> None:
        """Engines sleep; those that start meanwhile wait until the GPUs are theirs again."""
        self._is_night = is_night

    def is_night(self) -> bool:
        return self._is_night

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
