"""Notices that a machine will soon be taken away, after which training writes a checkpoint before it goes on."""

from __future__ import annotations

from collections.abc import Callable, Set

Doomed = Callable[[], Set[str]]
"""The machines that will be taken away. Every worker asks after every step, and all get the same answer."""


def none_doomed() -> Set[str]:
    return frozenset()


class Notices:
    def __init__(self, doomed: Doomed) -> None:
        self._doomed = doomed
        self._known: Set[str] = frozenset()

    def is_new(self) -> bool:
        """Whether there is a machine that was not doomed when this was last asked."""
        now = self._doomed()
        is_new = not now <= self._known
        self._known = now
        return is_new
