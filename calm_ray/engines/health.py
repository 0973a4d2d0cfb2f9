"""Engine health: the states and their transitions, heartbeats, and how long to wait for starting engines."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    STARTING = "starting"
    """Waiting for resources or loading the model, initially and after each death."""
    STALE = "stale"
    """Running, but with an outdated policy."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """No heartbeat for a while; gets no new work."""
    DEAD = "dead"
    RETIRED = "retired"
    """Died too often; not restarted."""


NEXT: dict[Health, frozenset[Health]] = {
    Health.STARTING: frozenset({Health.STALE, Health.DEAD}),
    Health.STALE: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.HEALTHY: frozenset({Health.STALE, Health.SUSPECT, Health.DEAD}),
    Health.SUSPECT: frozenset({Health.HEALTHY, Health.STALE, Health.DEAD}),
    Health.DEAD: frozenset({Health.STARTING, Health.RETIRED}),
    Health.RETIRED: frozenset(),
}


@dataclass
class Patience:
    """How long to wait for starting engines: as long as one comes up every `seconds`."""

    seconds: float
    late: Collection[int]
    """Engines that an earlier wait gave up on; not waited for again."""
    since: float
    up: int = 0

    def is_over(self, up: int, coming: Collection[int], now: float) -> bool:
        """Whether to start with the `up` engines, if any, instead of waiting for those still `coming`."""
        if up > self.up:
            self.up, self.since = up, now
        return up > 0 and (now - self.since > self.seconds or set(coming) <= set(self.late))


class Heartbeats:
    """Collects the engines' heartbeats. A separate Ray actor, so that reading them never waits for an engine.

    A beat counts only if the engine is idle or has computed a step since its previous beat. After a restart this actor
    is empty and relearns what it needs about running engines from their beats.
    """

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._last_beats: dict[int, float] = {}
        self._starts: dict[int, int] = {}
        self._started_at: dict[int, float] = {}
        self._nodes: dict[int, str] = {}
        self._dispatches: dict[int, tuple[int, str | None]] = {}
        self._is_paused: bool | None = None  # None until set, or until a beat comes from a sleeping engine

    def started(self, engine: int, node: str) -> None:
        """Records that an engine's process has started on this node."""
        self._starts[engine] = self._starts.get(engine, 0) + 1
        self._nodes[engine] = node
        self._steps[engine] = -1
        self._last_beats[engine] = self._started_at[engine] = time.monotonic()

    def beat(self, engine: int, steps: int, at_work: bool, is_asleep: bool) -> None:
        if not at_work or steps != self._steps.get(engine):
            self._last_beats[engine] = time.monotonic()
        self._steps[engine] = steps
        self._starts.setdefault(engine, 1)
        self._started_at.setdefault(engine, time.monotonic())
        if self._is_paused is None and is_asleep:
            self._is_paused = True

    def begins(self, ticket: int, engine: int) -> None:
        """Records that an engine has started on the dispatch with this ticket."""
        self._dispatches[ticket] = engine, self._nodes.get(engine)

    def has_started(self, ticket: int) -> bool:
        return ticket in self._dispatches

    def silence_of_ticket(self, ticket: int) -> float | None:
        """Seconds since the last heartbeat of the engine that started on this ticket; None if none has."""
        if ticket not in self._dispatches:
            return None
        engine, _ = self._dispatches[ticket]
        return time.monotonic() - self._last_beats.get(engine, time.monotonic())

    def node_of_ticket(self, ticket: int) -> str | None:
        """Node of the engine that started on this ticket, if known."""
        _, node = self._dispatches.get(ticket, (0, None))
        return node

    def set_paused(self, is_paused: bool) -> None:
        """While paused, engines sleep, and those that start wait until their GPUs are free again."""
        self._is_paused = is_paused
        if not is_paused:  # the pause does not count toward an engine's age
            self._started_at = dict.fromkeys(self._started_at, time.monotonic())

    def is_paused(self) -> bool:
        return bool(self._is_paused)

    def silence(self) -> dict[int, float]:
        """Seconds since the last heartbeat of each engine that has started."""
        now = time.monotonic()
        return {engine: now - beat for engine, beat in self._last_beats.items()}

    def ages(self) -> dict[int, float]:
        """Seconds since each engine's process started."""
        now = time.monotonic()
        return {engine: now - started for engine, started in self._started_at.items()}

    def starts(self) -> dict[int, int]:
        """Number of starts of each engine."""
        return dict(self._starts)
