"""When to checkpoint besides every `train.checkpoint_steps`: on preemption notices and on a timer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Set

import torch
import torch.distributed as dist

PreemptedNodes = Callable[[], Set[str]]
"""Returns the nodes about to be preempted. Called on every worker after every step; must agree on all of them."""


def no_preemptions() -> Set[str]:
    return frozenset()


class PreemptionNotices:
    def __init__(self, preempted: PreemptedNodes) -> None:
        self._preempted = preempted
        self._known: Set[str] = frozenset()

    def is_new(self) -> bool:
        """Whether any node has received a preemption notice since the last call."""
        now = self._preempted()
        is_new = not now <= self._known
        self._known = now
        return is_new


class Timer:
    """Due once `seconds` have elapsed on rank 0's clock, since all ranks must checkpoint together."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()

    def is_due(self) -> bool:
        """Whether `seconds` have elapsed since the start. Collective: call on all ranks."""
        if self._seconds == math.inf:
            return False
        is_due = torch.tensor(int(time.monotonic() - self._started > self._seconds), device=self._device)
        dist.broadcast(is_due, src=0)
        return bool(is_due)
