"""Two drivers on one run: real processes, real SIGKILL; another machine is a lock file that names one."""

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
    with locked(Storage(sys.argv[1]), lambda line: print("said", line, flush=True)):
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

left = {"nothing": None, "torn": b"", "stale": sys.argv[3].encode()}
for _ in range(4):
    race(left[sys.argv[2]])
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that take the lock and hold it until they are told a line."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def lock_file(tmp_path: Path) -> Path:
    return tmp_path / ".run.lock"


def take(tmp_path: Path) -> list[str]:
    """Takes the lock and gives it back; returns what was said."""
    said: list[str] = []
    with locked(Storage(str(tmp_path / "run")), said.append):
        assert lock_file(tmp_path).exists()
    return said


def leave(tmp_path: Path, content: bytes, seconds_ago: float) -> None:
    """A lock that was touched so long ago."""
    lock_file(tmp_path).write_bytes(content)
    then = time.time() - seconds_ago
    os.utime(lock_file(tmp_path), (then, then))


def elsewhere() -> bytes:
    return this_process().model_copy(update={"host": "node7", "pid": 4242}).model_dump_json().encode()


def hidden(tmp_path: Path) -> list[str]:
    return [file.name for file in tmp_path.iterdir()]


def test_a_lock_leaves_nothing_and_makes_no_run(tmp_path: Path) -> None:
    assert take(tmp_path / "runs") == []
    assert hidden(tmp_path / "runs") == []


def test_the_second_driver_is_told_who_the_first_one_is(
    tmp_path: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    first = holder()
    assert answer(first) == "held\n"
    with pytest.raises(InUseError, match=rf"run: in use by process {first.pid} of .* since .*another name"):
        take(tmp_path)
    tell(first)
    first.wait()
    assert take(tmp_path) == []


def test_a_killed_driver_is_replaced_at_once(tmp_path: Path, holder: Callable[[], subprocess.Popen[str]]) -> None:
    first = holder()
    assert answer(first) == "held\n"
    first.kill()
    first.wait()
    (said,) = take(tmp_path)
    assert f"in place of process {first.pid}" in said
    assert hidden(tmp_path) == []


def test_a_pid_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    earlier = this_process().model_copy(update={"process_started": 1})
    leave(tmp_path, earlier.model_dump_json().encode(), 0)
    assert len(take(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b'{"host": "no', b"\xff\xfe", b"[" * 5000, elsewhere()])
def test_another_machine_and_what_cannot_be_read_are_waited_for(tmp_path: Path, content: bytes) -> None:
    leave(tmp_path, content, 50)
    with pytest.raises(InUseError, match=r"last sign of life was \d+ s ago.*try again 60 s after"):
        take(tmp_path)
    assert lock_file(tmp_path).read_bytes() == content
    leave(tmp_path, content, 70)
    assert len(take(tmp_path)) == 1
    assert hidden(tmp_path) == []


def test_words_of_a_lock_cannot_drive_a_terminal(tmp_path: Path) -> None:
    leave(tmp_path, elsewhere().replace(b"node7", rb"\u001b[2J"), 0)
    with pytest.raises(InUseError) as refused:
        take(tmp_path)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("left", ["nothing", "torn", "stale"])
def test_of_eight_that_try_at_once_one_wins(tmp_path: Path, left: str) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "run"), left, elsewhere().decode()]
    races = subprocess.run(command, capture_output=True, text=True, check=True)
    assert races.stdout.split() == ["1"] * 4
    assert hidden(tmp_path) == []


def test_a_claim_whose_maker_died_is_cleared(tmp_path: Path) -> None:
    content = elsewhere()
    leave(tmp_path, content, 70)
    claim = lock_file(tmp_path).with_name(f".run.lock.{hashlib.sha256(content).hexdigest()[:16]}")
    claim.write_bytes(content)
    with pytest.raises(InUseError, match="at this moment"):
        take(tmp_path)
    os.utime(claim, (0, 0))
    assert len(take(tmp_path)) == 1
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_gives_the_lock_back(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), locked(Storage(str(tmp_path / "run")), print):
        raise error
    assert hidden(tmp_path) == []


def test_the_lock_outlives_the_run_s_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    with locked(storage, print):
        storage.write("config.json", b"{}")
        storage.delete("")  # as --overwrite does
        with pytest.raises(InUseError):
            take(tmp_path)


def test_an_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with locked(Storage(str(tmp_path / "run")), print):
        os.utime(lock_file(tmp_path), (0, 0))
        while lock_file(tmp_path).stat().st_mtime == 0:
            time.sleep(0.01)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as a program has it by default: scripts may ignore it, and the libraries of other tests take it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("taken", [True, False])
def test_who_lost_the_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    said: list[str] = []

    def work() -> None:
        with locked(Storage(str(tmp_path / "run")), said.append):
            if taken:
                leave(tmp_path, elsewhere(), 0)
            else:
                lock_file(tmp_path).unlink()
            threading.Event().wait()

    with pytest.raises(CalmRayError, match="node7" if taken else "is gone"):
        work()
    assert "has lost its lock" in said[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert lock_file(tmp_path).exists() == taken  # another's lock is not ours to delete


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/\.run\.lock could not be written"):
        take(tmp_path / "file")
    with pytest.raises(StorageError, match="could not be written"):
        take(Path("/proc/self"))
