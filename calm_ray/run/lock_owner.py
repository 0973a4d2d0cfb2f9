"""Who works on a run: one process, as it is named to people and found again by others."""

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

# A lock is a file that others may have written, and its words are printed.
Word = Annotated[str, StringConstraints(pattern=r"^[\w.:@\[\] +-]*$", max_length=255)]
OTHERS = re.compile(r"[^\w.:@\[\] +-]")


class InUseError(InputError):
    """Another process works on the run; the message names it and says what to do."""


class Owner(BaseModel):
    """A process, so that another one can tell whether it still lives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Word
    boot: Word
    """The kernel's boot id: after a restart of the machine the same pid is another process."""
    pid_namespace: Word
    pid: Annotated[int, Field(gt=0)]
    process_started: int
    """In clock ticks since boot; a pid that was given again has another one."""
    user: Word
    since: Word
    token: Word
    """Unlike that of any other lock."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"

    @property
    def is_of_this_machine(self) -> bool:
        """Whether its pid means something to this process."""
        return (self.host, self.boot, self.pid_namespace) == _machine()

    @property
    def lives(self) -> bool:
        """Whether the process is there; to be asked on its own machine only."""
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
    """The owner that a lock names; None where it is torn, empty or something else."""
    try:
        return Owner.model_validate_json(content)
    except ValidationError:
        return None


def _machine() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return OTHERS.sub("_", socket.gethostname()), boot, str(Path("/proc/self/ns/pid").readlink())


def _process_started(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot; None where there is none, or only what is left of one.

    Fields 3 and 22 of /proc/PID/stat, see proc(5).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the second field is the command's name, which may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _user() -> str:
    try:
        return OTHERS.sub("_", getpass.getuser())
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
