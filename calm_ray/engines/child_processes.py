"""Kills child processes when their parent exits, even if the parent is killed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import psutil


class ChildProcesses:
    """The descendants of this process so far. A watcher process kills them when this one exits."""

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        # Python's resource tracker exits by itself, after removing the shared memory that the others leave behind.
        self._processes = [one for one in children if not any("resource_tracker" in word for word in one.cmdline())]
        ids = [f"{process.pid}:{process.create_time()}" for process in self._processes]
        # The watcher reads stdin from a pipe to this process, which closes when this process exits for any reason.
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", __name__, *ids], stdin=subprocess.PIPE, start_new_session=True
        )

    @property
    def all_alive(self) -> bool:
        try:
            return all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self._processes)
        except psutil.NoSuchProcess:
            return False


def kill_all(children: list[str]) -> None:
    """Kills the processes given as PID:CREATION_TIME, unless their PIDs have been reused."""
    for child in children:
        pid, created = child.split(":")
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                process.kill()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill_all(sys.argv[1:])
