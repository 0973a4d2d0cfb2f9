"""When a checkpoint is written beside those after so many steps: at notices that a machine goes, and by the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Set

import torch
import torch.distributed as dist

PreemptedNodes = Callable[[], Set[str]]
"""The machines that will be taken away. Every worker asks after every step, and all get the same answer."""


def none_preempted() -> Set[str]:
    return frozenset()


class PreemptionNotices:
    def __init__(self, preempted: PreemptedNodes) -> None:
        self._preempted = preempted
        self._known: Set[str] = frozenset()

    def is_new(self) -> bool:
        """Whether there is a machine that was not about to be preempted when this was last asked."""
        now = self._preempted()
        is_new = not now <= self._known
        self._known = now
        return is_new


class Timer:
    """Tells when so many seconds have passed, by the first worker's clock: all must write a checkpoint together."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()

    def is_due(self) -> bool:
        """Whether the time since the start is over. Every worker must ask; nobody is asked where it is endless."""
        if self._seconds == math.inf:
            return False
        is_due = torch.tensor(int(time.monotonic() - self._started > self._seconds), device=self._device)
        dist.broadcast(is_due, src=0)
        return bool(is_due)
