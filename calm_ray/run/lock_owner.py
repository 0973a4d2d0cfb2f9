"""The owner of a run's lock: identifies a process to the user and to other processes."""

from __future__ import annotations

import getpass
import os
import re
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from calm_ray.core.errors import InputError

# Anyone may have written the lock file, and its fields are printed.
Word = Annotated[str, StringConstraints(pattern=r"^[\w.:@\[\] +-]*$", max_length=255)]
DISALLOWED = re.compile(r"[^\w.:@\[\] +-]")


class InUseError(InputError):
    """Another process is working on the run. The message names it and says what to do."""


class Owner(BaseModel):
    """A process, with enough detail for others to tell whether it is still alive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Word
    boot: Word
    """The kernel's boot id, since pids are reused after a reboot."""
    pid_namespace: Word
    pid: Annotated[int, Field(gt=0)]
    process_started: int
    """Start time in clock ticks since boot, which tells apart processes that reuse a pid."""
    user: Word
    since: Word
    token: Word
    """Unique id of this lock."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"

    @property
    def is_on_this_host(self) -> bool:
        """Whether its pid is valid in this process's host and pid namespace."""
        return (self.host, self.boot, self.pid_namespace) == _machine()

    @property
    def lives(self) -> bool:
        """Whether the process is alive. Only meaningful on the same host."""
        return _process_started(self.pid) == self.process_started


def this_process() -> Owner:
    host, boot, pid_namespace = _machine()
    return Owner(
        host=host,
        boot=boot,
        pid_namespace=pid_namespace,
        pid=os.getpid(),
        process_started=_process_started(os.getpid()) or 0,
        user=_user(),
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        token=uuid.uuid4().hex,
    )


def parse_owner(content: bytes) -> Owner | None:
    """Parses a lock file. Returns None if it is corrupt, empty or not a lock file."""
    try:
        return Owner.model_validate_json(content)
    except ValidationError:
        return None


def _machine() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return DISALLOWED.sub("_", socket.gethostname()), boot, str(Path("/proc/self/ns/pid").readlink())


def _process_started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is no such process or it is a zombie.

    Reads fields 3 and 22 of /proc/PID/stat, see proc(5).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the second field, the command's name, may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def _user() -> str:
    try:
        return DISALLOWED.sub("_", getpass.getuser())
    except (KeyError, OSError):  # a user without a name, as in containers
        return f"uid {os.getuid()}"
