"""A leash for child processes: they end with the process that started them, even where that one is killed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import psutil


class ChildProcesses:
    """On the processes that this one has started so far, and theirs."""

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        # Python's own tracker ends by itself, once it has removed the shared memory that the others leave behind.
        self._processes = [one for one in children if not any("resource_tracker" in word for word in one.cmdline())]
        named = [f"{process.pid}:{process.create_time()}" for process in self._processes]
        # Its standard input is a pipe whose other end is here: it closes when this process ends, however that happens.
        self._holder = subprocess.Popen(
            [sys.executable, "-m", __name__, *named], stdin=subprocess.PIPE, start_new_session=True
        )

    @property
    def all_alive(self) -> bool:
        try:
            return all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self._processes)
        except psutil.NoSuchProcess:
            return False


def end(children: list[str]) -> None:
    """Ends the processes PID:TIME of creation, if they are still the same."""
    for child in children:
        pid, created = child.split(":")
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                process.kill()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(sys.argv[1:])
