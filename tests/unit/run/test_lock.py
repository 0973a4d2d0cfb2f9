"""Two drivers on one run, with real processes and SIGKILL. Lock files that name another host stand in for one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from factories import read_line, send_line

from calm_ray.core.errors import CalmRayError, StorageError
from calm_ray.run import lock
from calm_ray.run.lock import locked
from calm_ray.run.lock_owner import InUseError, this_process
from calm_ray.run.storage import Storage

HOLDER = """
import sys, time
from calm_ray.core.errors import CalmRayError
from calm_ray.run.lock import locked
from calm_ray.run.storage import Storage
try:
    with locked(Storage(sys.argv[1]), lambda line: print("log", line, flush=True)):
        print("held", flush=True)
        sys.stdin.readline()
except CalmRayError as error:
    print("refused", error, flush=True)
"""

RACE = """
import multiprocessing, os, sys
from pathlib import Path
from calm_ray.run.lock import locked
from calm_ray.run.lock_owner import InUseError
from calm_ray.run.storage import Storage

def run(barrier, outcomes):
    barrier.wait()
    try:
        with locked(Storage(sys.argv[1]), lambda line: None):
            outcomes.put("won")
            barrier.wait()  # until all have tried
    except InUseError:
        outcomes.put("refused")
        barrier.wait()

def race(content):
    path = Path(sys.argv[1]).with_name(".run.lock")
    if content is not None:
        path.write_bytes(content)
        os.utime(path, (0, 0))
    forks = multiprocessing.get_context("fork")
    barrier, outcomes = forks.Barrier(8), forks.Queue()
    processes = [forks.Process(target=run, args=(barrier, outcomes)) for _ in range(8)]
    for process in processes:
        process.start()
    print(sorted(outcomes.get() for _ in processes).count("won"), flush=True)
    for process in processes:
        process.join()

contents = {"missing": None, "empty": b"", "stale": sys.argv[3].encode()}
for _ in range(4):
    race(contents[sys.argv[2]])
"""


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that hold the lock until they read a line from stdin."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def lock_file(tmp_path: Path) -> Path:
    return tmp_path / ".run.lock"


def try_lock(tmp_path: Path) -> list[str]:
    """Acquires and releases the lock; returns the messages logged."""
    messages: list[str] = []
    with locked(Storage(str(tmp_path / "run")), messages.append):
        assert lock_file(tmp_path).exists()
    return messages


def write_lock(tmp_path: Path, content: bytes, seconds_ago: float) -> None:
    """Writes a lock file last touched `seconds_ago`."""
    lock_file(tmp_path).write_bytes(content)
    then = time.time() - seconds_ago
    os.utime(lock_file(tmp_path), (then, then))


def remote_lock() -> bytes:
    return this_process().model_copy(update={"host": "node7", "pid": 4242}).model_dump_json().encode()


def file_names(tmp_path: Path) -> list[str]:
    return [file.name for file in tmp_path.iterdir()]


def test_lock_leaves_no_files_behind(tmp_path: Path) -> None:
    assert try_lock(tmp_path / "runs") == []
    assert file_names(tmp_path / "runs") == []


def test_second_driver_is_told_who_holds_the_lock(
    tmp_path: Path, start_holder: Callable[[], subprocess.Popen[str]]
) -> None:
    first = start_holder()
    assert read_line(first) == "held\n"
    with pytest.raises(InUseError, match=rf"run: in use by process {first.pid} of .* since .*another name"):
        try_lock(tmp_path)
    send_line(first)
    first.wait()
    assert try_lock(tmp_path) == []


def test_lock_of_a_killed_driver_is_taken_over_immediately(
    tmp_path: Path, start_holder: Callable[[], subprocess.Popen[str]]
) -> None:
    first = start_holder()
    assert read_line(first) == "held\n"
    first.kill()
    first.wait()
    (message,) = try_lock(tmp_path)
    assert f"took over the lock from process {first.pid}" in message
    assert file_names(tmp_path) == []


def test_reused_pid_is_not_mistaken_for_the_owner(tmp_path: Path) -> None:
    earlier = this_process().model_copy(update={"process_started": 1})
    write_lock(tmp_path, earlier.model_dump_json().encode(), 0)
    assert len(try_lock(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b'{"host": "no', b"\xff\xfe", b"[" * 5000, remote_lock()])
def test_remote_and_unreadable_locks_expire_after_a_timeout(tmp_path: Path, content: bytes) -> None:
    write_lock(tmp_path, content, 50)
    with pytest.raises(InUseError, match=r"last heartbeat was \d+ s ago.*try again 60 s after"):
        try_lock(tmp_path)
    assert lock_file(tmp_path).read_bytes() == content
    write_lock(tmp_path, content, 70)
    assert len(try_lock(tmp_path)) == 1
    assert file_names(tmp_path) == []


def test_lock_content_cannot_inject_terminal_escapes(tmp_path: Path) -> None:
    write_lock(tmp_path, remote_lock().replace(b"node7", rb"\u001b[2J"), 0)
    with pytest.raises(InUseError) as refused:
        try_lock(tmp_path)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("existing", ["missing", "empty", "stale"])
def test_exactly_one_of_eight_concurrent_drivers_wins(tmp_path: Path, existing: str) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "run"), existing, remote_lock().decode()]
    races = subprocess.run(command, capture_output=True, text=True, check=True)
    assert races.stdout.split() == ["1"] * 4
    assert file_names(tmp_path) == []


def test_claim_of_a_dead_process_is_cleared(tmp_path: Path) -> None:
    content = remote_lock()
    write_lock(tmp_path, content, 70)
    claim = lock_file(tmp_path).with_name(f".run.lock.{hashlib.sha256(content).hexdigest()[:16]}")
    claim.write_bytes(content)
    with pytest.raises(InUseError, match="right now"):
        try_lock(tmp_path)
    os.utime(claim, (0, 0))
    assert len(try_lock(tmp_path)) == 1
    assert file_names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_run_releases_the_lock(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), locked(Storage(str(tmp_path / "run")), print):
        raise error
    assert file_names(tmp_path) == []


def test_lock_survives_deletion_of_the_run_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    with locked(storage, print):
        storage.write("config.json", b"{}")
        storage.delete("")  # as --overwrite does
        with pytest.raises(InUseError):
            try_lock(tmp_path)


def test_owner_sends_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with locked(Storage(str(tmp_path / "run")), print):
        os.utime(lock_file(tmp_path), (0, 0))
        while lock_file(tmp_path).stat().st_mtime == 0:
            time.sleep(0.01)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Restores the default SIGINT handler, which scripts may disable and libraries used by other tests replace."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("is_stolen", [True, False], ids=["stolen", "deleted"])
def test_run_stops_after_losing_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stolen: bool) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    messages: list[str] = []

    def work() -> None:
        with locked(Storage(str(tmp_path / "run")), messages.append):
            if is_stolen:
                write_lock(tmp_path, remote_lock(), 0)
            else:
                lock_file(tmp_path).unlink()
            threading.Event().wait()

    with pytest.raises(CalmRayError, match="node7" if is_stolen else "is missing"):
        work()
    assert "has lost its lock" in messages[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert lock_file(tmp_path).exists() == is_stolen  # another process's lock stays


def test_unwritable_folder_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/\.run\.lock could not be written"):
        try_lock(tmp_path / "file")
    with pytest.raises(StorageError, match="could not be written"):
        try_lock(Path("/proc/self"))
