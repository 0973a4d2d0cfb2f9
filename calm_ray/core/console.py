"""Progress output: a live bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calm_ray.core.safety import redact

LINE_SECONDS = 10.0
"""Seconds between progress lines when the output is not a terminal."""

console = Console(highlight=False, soft_wrap=True)


class ProgressBar:
    """Progress of one long step. Call `advance`; its `note` is shown next to the count."""

    def __init__(self, title: str, total: int | None, bar: Progress | None) -> None:
        self._title, self._total, self._bar = title, total, bar
        self._task = bar.add_task(title, total=total, note="") if bar else None
        self._done, self._note = 0, ""
        self._started = self._last_line = time.monotonic()

    def begin(self, title: str, total: int | None = None) -> None:
        """Counts from zero again, for another part of the step."""
        self._title, self._total, self._done, self._note = title, total, 0, ""
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=title, total=total, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._done += count
        self._note = self._note if note is None else note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, note=self._note)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            total = f" of {self._total}" if self._total else ""
            say(f"  {self._title}: {self._done}{total}{'; ' + self._note if self._note else ''}")

    def close(self) -> float:
        """Ends the step and returns its duration in seconds."""
        seconds = time.monotonic() - self._started
        if self._bar is None:
            say(f"{self._title}: {self._done}, {seconds:.1f} s{'; ' + self._note if self._note else ''}")
        return seconds


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[ProgressBar]:
    """Shows live progress for the duration of the block."""
    if not console.is_terminal:
        progress = ProgressBar(title, total, None)
        yield progress
        progress.close()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield ProgressBar(title, total, bar)


@contextmanager
def use_stderr(wanted: bool) -> Iterator[None]:
    """Sends console output to stderr if `wanted`, to keep stdout clean for machine-readable results."""
    console.stderr = wanted
    try:
        yield
    finally:
        console.stderr = False


def say(message: str) -> None:
    """Prints a line for the user and flushes it, so that log files are up to date."""
    console.print(redact(message), markup=False)
    console.file.flush()
