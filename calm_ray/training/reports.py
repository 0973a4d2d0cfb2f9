"""What training reports while it runs: rows of metrics, which are stored too, and events, which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Report = Callable[[Row], None]
"""Receives metrics and events."""

STARTED, REFERENCE, RESUMED, NOTICED, LOST = "started", "reference", "resumed", "noticed", "lost"
"""Events, each named by a key of its row: all workers run; examples with reference log-probabilities (of `total`);
the step that training resumes from; the step at which it noticed a coming preemption; the workers that were lost."""
_EVENTS = frozenset((STARTED, REFERENCE, RESUMED, NOTICED, LOST))


def is_event(row: Row) -> bool:
    return not _EVENTS.isdisjoint(row)


def describe(row: Row) -> str | None:
    """Returns the log line for an event; None if it has none."""
    if RESUMED in row:
        return f"  training resumes from step {row[RESUMED]}"
    if NOTICED in row:
        return f"  a node is about to be preempted; training saved a checkpoint at step {row[NOTICED]}"
    if LOST in row:
        return f"  training lost worker {', '.join(map(str, row[LOST]))}: {row['why']}"
    return None
