"""Storages that do not answer, forbid, or hold what is damaged; and what a node keeps of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from calm_ray.core.errors import CalmRayError, StorageError
from calm_ray.run import storage as storages
from calm_ray.run.policies import Policy, cache_folder, fetch, forget_policies, node_lock, publish
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

SILENT = "When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, http://me:password@host"
ROWS = pa.table({"n": [1, 2, 3]})


class Flaky:
    """A disk, or a file of it, that fails as an object store does in the first of every so many calls; 0: in none."""

    def __init__(self, inner: Any, every: int) -> None:
        self._inner, self._every, self.calls = inner, every, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name) if name == "size" else lambda *given: self._call(name, *given)

    def _call(self, name: str, *given: Any) -> Any:
        self.calls += 1
        if self._every and self.calls % self._every == 1 % self._every:
            raise OSError(SILENT)
        result = getattr(self._inner, name)(*given)
        return Flaky(result, self._every) if name == "open_input_file" else result

    def __enter__(self) -> Flaky:
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.close()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Storage]:
    """A storage whose calls fail once in every so many, and that waits for nothing; files are in `tmp_path`/store."""
    monkeypatch.setattr(storages, "WAITS", (0, 0, 0))
    monkeypatch.setattr(storages, "BLOCK_BYTES", 100)
    here = Storage(str(tmp_path / "store"))
    here.write("a.txt", b"content")
    here.write_table("a.parquet", ROWS)

    def of(every: int) -> Storage:
        storage = Storage("s3://bucket/run")
        storage.__dict__["_resolved"] = (Flaky(fs.LocalFileSystem(), every), here.root)
        return storage

    return of


OPERATIONS: dict[str, Callable[[Storage, Path], Any]] = {
    "exists": lambda storage, _: storage.exists("a.txt"),
    "files": lambda storage, _: storage.files(),
    "read": lambda storage, _: storage.read("a.txt"),
    "digest": lambda storage, _: storage.digest("a.txt"),
    "read_table": lambda storage, _: storage.read_table("a.parquet"),
    "write": lambda storage, _: storage.write("b.txt", b"new"),
    "delete": lambda storage, _: storage.delete("a.txt"),
    "download": lambda storage, path: storage.download("", path / "copy"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_object_store_that_fails_now_and_then_is_asked_again(
    remote: Callable[[int], Storage], operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do = OPERATIONS[operation]
    expected = None if operation in ("write", "delete", "download") else do(Storage(str(tmp_path / "store")), tmp_path)
    assert do(remote(3), tmp_path) == expected
    assert "trying again" in capsys.readouterr().out
    if operation == "write":
        assert (tmp_path / "store" / "b.txt").read_bytes() == b"new"
    if operation == "delete":
        assert not (tmp_path / "store" / "a.txt").exists()
    if operation == "download":
        assert (tmp_path / "copy" / "a.txt").read_bytes() == b"content"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_object_store_that_does_not_answer_is_one_error(
    remote: Callable[[int], Storage], operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = remote(1)
    with pytest.raises(StorageError, match=r"s3://bucket/run\S* could not be .*: .*NETWORK.*the same command") as error:
        OPERATIONS[operation](storage, tmp_path)
    assert "password" not in str(error.value)
    assert storage.filesystem.calls == 4
    assert capsys.readouterr().out.count("trying again") == 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["store"]


def test_a_file_that_is_not_there_is_not_asked_for_again(
    remote: Callable[[int], Storage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for storage in (remote(0), Storage(str(tmp_path / "store"))):
        for read in (storage.read, storage.digest, storage.read_table):
            with pytest.raises(FileNotFoundError):
                read("none")
    assert "again" not in capsys.readouterr().out


def test_a_disk_says_at_once_what_it_does_not_let(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "WAITS", (10_000,))
    storage = Storage(f"file://{tmp_path}")
    storage.write("folder/file", b"")
    for read in (storage.read, storage.digest):
        with pytest.raises(StorageError, match=r"folder could not be read: .*is a directory"):
            read("folder")
    with pytest.raises(StorageError, match=r"folder/file could not be listed: .*Not a directory"):
        storage.files("folder/file")
    with pytest.raises(StorageError, match=r"could not be copied to .*/folder/file/copy: Not a directory"):
        storage.download("folder", tmp_path / "folder" / "file" / "copy")


def test_a_chunk_is_torn_by_what_it_holds_and_not_by_a_store_that_fails(
    remote: Callable[[int], Storage], tmp_path: Path
) -> None:
    here = Stage(Storage(str(tmp_path / "store")))
    here.write("whole", ROWS)
    here.write("torn", ROWS)
    entries = here.manifest()
    here.storage.delete("manifest")
    here.storage.write("torn.parquet", here.storage.read("torn.parquet")[:-7])
    with pytest.raises(StorageError):
        Stage(remote(1))._entry_of_chunk("whole.parquet")
    assert Stage(remote(2))._entry_of_chunk("whole.parquet") == entries["whole.parquet"]
    assert Stage(remote(2))._entry_of_chunk("torn.parquet") is None


class Server(ThreadingHTTPServer):
    """Answers every request in the same way, and notes its method and path."""

    answer, code = 200, ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        body = f"<Error><Code>{self.server.code}</Code></Error>".encode() if self.server.code else b""
        self.send_response(self.server.answer)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_HEAD = do_DELETE = do_PUT

    def log_message(self, *given: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """What `s3://` is answered by."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


def test_a_small_file_is_a_single_put(server: Server) -> None:
    Storage("s3://bucket/run").write("a.txt", b"content")
    assert server.requests == ["PUT /bucket/run/a.txt"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (403, "AccessDenied"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken"),
        (301, "PermanentRedirect"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_waiting_does_not_mend_is_said_at_once(
    server: Server, operation: str, answer: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "WAITS", (10_000,))
    server.answer, server.code = answer, code
    with pytest.raises(StorageError, match=rf"s3://bucket/run\S* could not be .*({code}|ACCESS|INVALID|SIGN|status)"):
        OPERATIONS[operation](Storage("s3://bucket/run"), tmp_path)
    assert len(server.requests) == 1
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """One that is published, and fetched by nobody yet."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return publish(tmp_path / "adapter", Storage(str(tmp_path / "run")), "policy", 1, "adapter")


def kept(*parts: str) -> list[str]:
    return sorted(file.name for file in cache_folder().joinpath(*parts).iterdir() if file.is_dir())


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_a_policy_of_a_run_that_was_moved(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(CalmRayError, match=rf"{policy.location} is not there: its run was moved or deleted"):
        policy.local_folder()
    assert kept("policies") == []
    (tmp_path / "moved").rename(tmp_path / "run")
    (tmp_path / "run" / "policy" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(CalmRayError, match="is not what was written there"):
        policy.local_folder()


def test_policies_that_nobody_is_loading_are_forgotten(policy: Policy) -> None:
    folder = policy.local_folder()
    fetch(policy.location, policy.sha256, folder.with_name("r0002-other"))
    for one in (folder, folder.with_name("r0002-other")):
        age(one, 4_000)
    forget_policies({policy.name})
    assert kept("policies") == [policy.name]
    policy.local_folder()
    forget_policies([])  # it was used a moment ago
    assert kept("policies") == [policy.name]
    age(folder, 4_000)
    forget_policies([])
    assert kept("policies") == []
    assert policy.local_folder() == folder
    assert folder.is_dir()


def test_what_killed_processes_left_in_the_cache_is_deleted(policy: Policy) -> None:
    folder = policy.local_folder()
    for name, seconds in (("a.tmp-11111111", 100_000), ("b.tmp-22222222", 1_000)):
        folder.with_name(name).mkdir()
        folder.with_name(name).joinpath("weights").write_bytes(b"half")
        age(folder.with_name(name), seconds)
    age(folder, 100_000)
    with node_lock(folder):
        assert kept("policies") == ["b.tmp-22222222", policy.name]
