"""Progress for a person: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calm_ray.core.safety import redact

LINE_SECONDS = 10.0
"""How often a step says where it is when it writes into a file."""

console = Console(highlight=False, soft_wrap=True)


class ProgressBar:
    """One long step. `advance` it; what it `note`s stands beside the count."""

    def __init__(self, title: str, total: int | None, bar: Progress | None) -> None:
        self._title, self._total, self._bar = title, total, bar
        self._task = bar.add_task(title, total=total, note="") if bar else None
        self._done, self._note = 0, ""
        self._started = self._said = time.monotonic()

    def set_total(self, total: int) -> None:
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._done += count
        self._note = self._note if note is None else note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, note=self._note)
        elif time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            of = f" of {self._total}" if self._total else ""
            say(f"  {self._title}: {self._done}{of}{'; ' + self._note if self._note else ''}")

    def close(self) -> float:
        """Ends the step; returns its seconds."""
        seconds = time.monotonic() - self._started
        if self._bar is None:
            say(f"{self._title}: {self._done}, {seconds:.1f} s{'; ' + self._note if self._note else ''}")
        return seconds


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[ProgressBar]:
    """A step with live progress, ended when the block is left."""
    if not console.is_terminal:
        one = ProgressBar(title, total, None)
        yield one
        one.close()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield ProgressBar(title, total, bar)


@contextmanager
def on_stderr(wanted: bool) -> Iterator[None]:
    """Leaves standard output to what a command is asked for, where that is read by a program."""
    console.stderr = wanted
    try:
        yield
    finally:
        console.stderr = False


def say(message: str) -> None:
    """A line for the person; flushed, so that a log file shows it at once."""
    console.print(redact(message), markup=False)
    console.file.flush()
