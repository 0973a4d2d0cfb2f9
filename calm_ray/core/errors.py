"""The errors a user can see, with their exit codes."""

from __future__ import annotations


class CalmRayError(Exception):
    """A failure that its message fully explains. Subclasses must survive pickling, as Ray requires."""

    exit_code = 1


class InputError(CalmRayError):
    """Invalid user input. The message names the field, or the file and row, and says what to do."""

    exit_code = 2


class StorageError(CalmRayError):
    """The storage cannot read or write a file: a full disk, a read-only mount, a lost connection."""


class ResourceError(CalmRayError):
    """The cluster lacks the requested resources. The message says what is missing and what would fit."""

    exit_code = 3


class BadRow(Exception):
    """An unusable row. Rows with the same problem share the same `reason`, so that they can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
