"""One driver for each run: a lock file beside the run's folder, `STORAGE/.NAME.lock`, for all who see the same disk.

It lies beside the folder, not in it, so that `--overwrite` may delete the folder; no run's name begins with a dot.

The owner shows that it lives by touching the file. Its own machine looks for the process instead and takes over at once
when that has died; other machines wait until the file has not been touched for `SILENT_SECONDS`, by the clock of the
disk. Object stores have no such file: there only the lock within a cluster holds (`calm_ray.cluster.run_lock`).
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

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
MOST_BYTES = 4096
"""No lock of ours is larger."""


@contextmanager
def locked(storage: Storage, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps the run in this folder to this process, from before anything of it is written until the block is left.

    Raises InUseError where another process works on it, StorageError where the lock cannot be written, and
    CalmRayError where another process took over because this one had stood still: the main thread is interrupted then.
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
class _Found:
    """A lock file, as it was when it was judged."""

    content: bytes
    touched: int
    """In nanoseconds, by the disk's clock."""

    @property
    def owner(self) -> Owner | None:
        return parse_owner(self.content)


def _find(path: Path) -> _Found | None:
    # Opened first: network disks keep attributes for a while, and ask again when a file is opened.
    try:
        with open(path, "rb") as file:
            return _Found(file.read(MOST_BYTES), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _acquire(path: Path, owner: Owner, run: str, say: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        if _create(path, owner):
            return
        found = _find(path)
        if found is None:  # released at this moment
            continue
        _refuse_if_alive(path, found, run)
        if _take_over(path, found, owner):
            say(f"goes on in place of {found.owner or 'another process'}, which is dead or silent")
            return
    raise InUseError(f"{run}: other processes begin to work on it at this moment; a run has one at a time")


def _create(path: Path, owner: Owner) -> bool:
    """Writes a file that must not be there yet; of several processes that try, one succeeds."""
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


def _refuse_if_alive(path: Path, found: _Found, run: str) -> None:
    owner = found.owner
    who = str(owner) if owner else "another process"
    advice = "A run has one driver: stop that one first, or give this run another name."
    if owner and owner.is_of_this_machine:
        if owner.lives:
            raise InUseError(f"{run}: in use by {who}. {advice}")
        return
    silent = _silent_seconds(path, found)
    if silent < SILENT_SECONDS:
        raise InUseError(
            f"{run}: in use by {who}; its last sign of life was {max(0, round(silent))} s ago. {advice} "
            f"If it has died, try again {SILENT_SECONDS:.0f} s after its last sign of life."
        )


def _silent_seconds(path: Path, found: _Found) -> float:
    """How long ago the lock was touched, by the clock that its disk gives to a file made now."""
    probe = _beside(path)
    try:
        with open(probe, "xb") as file:
            return (os.fstat(file.fileno()).st_mtime_ns - found.touched) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _take_over(path: Path, found: _Found, owner: Owner) -> bool:
    """Replaces a dead owner's lock, if it is still as it was found; of several processes that try, one succeeds.

    Only who makes the claim file for the lock that was found may replace it; the lock's name is never free meanwhile.
    """
    claim = path.with_name(f"{path.name}.{hashlib.sha256(found.content).hexdigest()[:16]}")
    if not _create(claim, owner):
        left = _find(claim)
        if left and _silent_seconds(path, left) > SILENT_SECONDS:  # its maker died before it had replaced the lock
            claim.unlink(missing_ok=True)
        return False
    temporary = _beside(path)
    try:
        _create(temporary, owner)
        if _find(path) != found:
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _is_ours(found: _Found | None, owner: Owner) -> bool:
    return found is not None and found.owner == owner


def _release(path: Path, owner: Owner) -> None:
    with suppress(OSError):
        if _is_ours(_find(path), owner):
            path.unlink()


class _Heartbeat:
    """Touches the lock until it is stopped; interrupts the main thread, as Ctrl-C would, when the lock was lost."""

    def __init__(self, path: Path, owner: Owner, run: str, say: Callable[[str], None]) -> None:
        self.lost = ""
        """Why the lock is not ours any more; empty while it is."""
        self._path, self._owner, self._run, self._say = path, owner, run, say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="calm_ray lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that does not answer now; what is written meanwhile fails for itself
                if not self._touch():
                    self._stop_the_run()
                    return

    def _touch(self) -> bool:
        """Touches the lock; False where it is not ours. By its descriptor: the name may be another's by then."""
        try:
            with open(self._path, "rb") as file:
                if parse_owner(file.read(MOST_BYTES)) != self._owner:
                    return False
                os.utime(file.fileno())
                return True
        except FileNotFoundError:
            return False

    def _stop_the_run(self) -> None:
        found = None
        with suppress(OSError):
            found = _find(self._path)
        taker = f"{found.owner} took it over" if found and found.owner else f"{self._path} is gone"
        self.lost = (
            f"{self._run}: this process has lost its lock: {taker}. It had stood still for {SILENT_SECONDS:.0f} s or "
            "longer, or the file was deleted. What it wrote before is kept."
        )
        self._say(self.lost)
        main = threading.main_thread().ident
        # Where Ctrl-C is ignored, as by `nohup … &` in a script, nothing milder is left.
        interrupts = callable(signal.getsignal(signal.SIGINT))
        if main is not None:
            signal.pthread_kill(main, signal.SIGINT if interrupts else signal.SIGTERM)
