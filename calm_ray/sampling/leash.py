"""A leash for child processes: what this process started ends with it, even where it is killed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import psutil


def put_on_leash() -> subprocess.Popen[bytes]:
    """Starts a small process that ends this one's children, and theirs, when this one has ended."""
    children = [f"{child.pid}:{child.create_time()}" for child in psutil.Process().children(recursive=True)]
    # Its standard input is a pipe whose other end is here: it closes when this process ends, however that happens.
    return subprocess.Popen([sys.executable, "-m", __name__, *children], stdin=subprocess.PIPE, start_new_session=True)


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
