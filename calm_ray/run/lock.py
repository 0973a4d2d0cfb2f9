"""One driver per run: a lock file next to the run's folder, `STORAGE/.NAME.lock`, for all hosts that share the disk.

The file is outside the folder so that `--overwrite` can delete the folder. Run names never start with a dot.

The owner touches the file as a heartbeat. A process on the same host checks the owner's pid instead and takes over
immediately if it is dead; other hosts wait until the file has not been touched for `TIMEOUT_SECONDS` by the disk's
clock. Object stores have no such file; there, only the lock within a cluster applies (`calm_ray.cluster.run_lock`).
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from calm_ray.core.errors import CalmRayError, StorageError
from calm_ray.run.lock_owner import InUseError, Owner, parse_owner, this_process
from calm_ray.run.storage import Storage

HEARTBEAT_SECONDS = 5.0
TIMEOUT_SECONDS = 60.0
MAX_BYTES = 4096
"""Larger than any valid lock file."""


@contextmanager
def locked(storage: Storage, say: Callable[[str], None]) -> Iterator[None]:
    """Locks the run in this folder for the duration of the block. Enter it before writing any of the run's files.

    Raises InUseError if another process is working on the run, StorageError if the lock cannot be written, and
    CalmRayError if the lock is lost, for instance to a process that took over because this one was unresponsive; the
    main thread is interrupted in that case.
    """
    if not storage.is_local:
        yield
        return
    folder = Path(storage.path())
    path, owner = folder.with_name(f".{folder.name}.lock"), this_process()
    try:
        _acquire(path, owner, storage.uri(), say)
    except OSError as error:
        raise StorageError(f"storage: {path} could not be written: {error.strerror or error}") from error
    heartbeat = _Heartbeat(path, owner, storage.uri(), say)
    try:
        try:
            yield
        finally:
            heartbeat.stop()
            _release(path, owner)
    except BaseException as error:
        if heartbeat.lost:
            raise CalmRayError(heartbeat.lost) from error
        raise
    if heartbeat.lost:
        raise CalmRayError(heartbeat.lost)


@dataclass(frozen=True)
class _LockFile:
    """A lock file's state when it was read."""

    content: bytes
    touched: int
    """Time of the last heartbeat in nanoseconds, by the disk's clock."""

    @property
    def owner(self) -> Owner | None:
        return parse_owner(self.content)


def _read_lock(path: Path) -> _LockFile | None:
    # Opened first: network file systems cache attributes and refresh them on open.
    try:
        with open(path, "rb") as file:
            return _LockFile(file.read(MAX_BYTES), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _acquire(path: Path, owner: Owner, run: str, say: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        if _create(path, owner):
            return
        found = _read_lock(path)
        if found is None:  # just released
            continue
        _refuse_if_alive(path, found, run)
        if _take_over(path, found, owner):
            say(f"took over the lock from {found.owner or 'another process'} (dead or unresponsive)")
            return
    raise InUseError(f"{run}: other processes are acquiring its lock right now; a run has one driver at a time")


def _create(path: Path, owner: Owner) -> bool:
    """Writes a lock file unless it exists. Atomic: only one of several competing processes succeeds."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(owner.model_dump_json().encode())
            file.flush()
            os.fsync(descriptor)
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _refuse_if_alive(path: Path, found: _LockFile, run: str) -> None:
    owner = found.owner
    holder = str(owner) if owner else "another process"
    advice = "A run has one driver: stop that one first, or give this run another name."
    if owner and owner.is_on_this_host:
        if owner.lives:
            raise InUseError(f"{run}: in use by {holder}. {advice}")
        return
    silent = _seconds_silent(path, found)
    if silent < TIMEOUT_SECONDS:
        raise InUseError(
            f"{run}: in use by {holder}; its last heartbeat was {max(0, round(silent))} s ago. {advice} "
            f"If it has died, try again {TIMEOUT_SECONDS:.0f} s after its last heartbeat."
        )


def _seconds_silent(path: Path, found: _LockFile) -> float:
    """Seconds since the last heartbeat, by the disk's clock: compares with the mtime of a file created now."""
    probe = _temporary_path(path)
    try:
        with open(probe, "xb") as file:
            return (os.fstat(file.fileno()).st_mtime_ns - found.touched) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _take_over(path: Path, found: _LockFile, owner: Owner) -> bool:
    """Replaces a dead owner's lock unless it has changed. Only one of several competing processes succeeds.

    A process must first create a claim file named after the lock's content; the lock itself exists throughout.
    """
    claim = path.with_name(f"{path.name}.{hashlib.sha256(found.content).hexdigest()[:16]}")
    if not _create(claim, owner):
        stale = _read_lock(claim)
        if stale and _seconds_silent(path, stale) > TIMEOUT_SECONDS:  # its creator died before replacing the lock
            claim.unlink(missing_ok=True)
        return False
    temporary = _temporary_path(path)
    try:
        _create(temporary, owner)
        if _read_lock(path) != found:
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _is_ours(found: _LockFile | None, owner: Owner) -> bool:
    return found is not None and found.owner == owner


def _release(path: Path, owner: Owner) -> None:
    with suppress(OSError):
        if _is_ours(_read_lock(path), owner):
            path.unlink()


class _Heartbeat:
    """Touches the lock until stopped. If the lock is lost, interrupts the main thread as Ctrl-C would."""

    def __init__(self, path: Path, owner: Owner, run: str, say: Callable[[str], None]) -> None:
        self.lost = ""
        """Why the lock was lost; empty while this process has it."""
        self._path, self._owner, self._run, self._say = path, owner, run, say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="calm_ray lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a disk that is unavailable for now; other writes report that themselves
                if not self._touch():
                    self._stop_the_run()
                    return

    def _touch(self) -> bool:
        """Touches the lock and returns True if it is ours. Uses the descriptor, as the path may change hands."""
        try:
            with open(self._path, "rb") as file:
                if parse_owner(file.read(MAX_BYTES)) != self._owner:
                    return False
                os.utime(file.fileno())
                return True
        except FileNotFoundError:
            return False

    def _stop_the_run(self) -> None:
        found = None
        with suppress(OSError):
            found = _read_lock(self._path)
        reason = f"{found.owner} took it over" if found and found.owner else f"{self._path} is missing"
        self.lost = (
            f"{self._run}: this process has lost its lock: {reason}. It was unresponsive for at least "
            f"{TIMEOUT_SECONDS:.0f} s, or the file was deleted. Everything written so far is kept."
        )
        self._say(self.lost)
        main = threading.main_thread().ident
        # SIGTERM if SIGINT is ignored, as with `nohup … &` in a script.
        interrupts = callable(signal.getsignal(signal.SIGINT))
        if main is not None:
            signal.pthread_kill(main, signal.SIGINT if interrupts else signal.SIGTERM)
