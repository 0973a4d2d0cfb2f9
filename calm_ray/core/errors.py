"""The errors a user can meet, and the exit code each ends the program with."""

from __future__ import annotations


class CalmRayError(Exception):
    """A failure that is explained in one message. All of these survive pickling, as Ray needs."""

    exit_code = 1


class InputError(CalmRayError):
    """Something the user gave is wrong; the message names the field, or the file and row, and what to do."""

    exit_code = 2


class StorageError(CalmRayError):
    """The storage does not take or give a file: a full disk, a read-only mount, a lost connection."""


class ResourceError(CalmRayError):
    """The cluster cannot hold what is asked of it; the message says what is short and what would fit."""

    exit_code = 3


class BadRow(Exception):
    """A row that cannot be used. The reason is the same for all rows of its kind, so that it can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
