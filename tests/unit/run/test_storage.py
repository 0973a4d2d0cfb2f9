"""Unreachable, forbidden and corrupt storage, and the cache on each node."""

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
from calm_ray.run.policies import Policy, cache_folder, evict_policies, fetch, node_lock, publish
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

SILENT = "When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, http://me:password@host"
ROWS = pa.table({"n": [1, 2, 3]})


class Flaky:
    """A filesystem, or one of its files, that fails like an object store in the first of `every` calls (0: never)."""

    def __init__(self, inner: Any, every: int) -> None:
        self._inner, self._every, self.calls = inner, every, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name) if name == "size" else lambda *args: self._call(name, *args)

    def _call(self, name: str, *args: Any) -> Any:
        self.calls += 1
        if self._every and self.calls % self._every == 1 % self._every:
            raise OSError(SILENT)
        result = getattr(self._inner, name)(*args)
        return Flaky(result, self._every) if name == "open_input_file" else result

    def __enter__(self) -> Flaky:
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.close()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Storage]:
    """Makes a `Flaky` S3 storage that retries without waiting; its files are in `tmp_path`/store."""
    monkeypatch.setattr(storages, "WAITS", (0, 0, 0))
    monkeypatch.setattr(storages, "BLOCK_BYTES", 100)
    local = Storage(str(tmp_path / "store"))
    local.write("a.txt", b"content")
    local.write_table("a.parquet", ROWS)

    def make(every: int) -> Storage:
        storage = Storage("s3://bucket/run")
        storage.__dict__["_resolved"] = (Flaky(fs.LocalFileSystem(), every), local.root)
        return storage

    return make


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
def test_intermittent_object_store_errors_are_retried(
    remote: Callable[[int], Storage], operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operate = OPERATIONS[operation]
    expected = (
        None if operation in ("write", "delete", "download") else operate(Storage(str(tmp_path / "store")), tmp_path)
    )
    assert operate(remote(3), tmp_path) == expected
    assert "retrying" in capsys.readouterr().out
    if operation == "write":
        assert (tmp_path / "store" / "b.txt").read_bytes() == b"new"
    if operation == "delete":
        assert not (tmp_path / "store" / "a.txt").exists()
    if operation == "download":
        assert (tmp_path / "copy" / "a.txt").read_bytes() == b"content"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unreachable_object_store_raises_one_error(
    remote: Callable[[int], Storage], operation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = remote(1)
    with pytest.raises(StorageError, match=r"s3://bucket/run\S* could not be .*: .*NETWORK.*the same command") as error:
        OPERATIONS[operation](storage, tmp_path)
    assert "password" not in str(error.value)
    assert storage.filesystem.calls == 4
    assert capsys.readouterr().out.count("retrying") == 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["store"]


def test_missing_files_are_not_retried(
    remote: Callable[[int], Storage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for storage in (remote(0), Storage(str(tmp_path / "store"))):
        for read in (storage.read, storage.digest, storage.read_table):
            with pytest.raises(FileNotFoundError):
                read("none")
    assert "retrying" not in capsys.readouterr().out


def test_local_disk_errors_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_storage_errors_do_not_make_chunks_corrupt(remote: Callable[[int], Storage], tmp_path: Path) -> None:
    local = Stage(Storage(str(tmp_path / "store")))
    local.write("intact", ROWS)
    local.write("corrupt", ROWS)
    entries = local.manifest()
    local.storage.delete("manifest")
    local.storage.write("corrupt.parquet", local.storage.read("corrupt.parquet")[:-7])
    with pytest.raises(StorageError):
        Stage(remote(1))._entry_of_chunk("intact.parquet")
    assert Stage(remote(2))._entry_of_chunk("intact.parquet") == entries["intact.parquet"]
    assert Stage(remote(2))._entry_of_chunk("corrupt.parquet") is None


class Server(ThreadingHTTPServer):
    """Gives every request the same response and records its method and path."""

    status, code = 200, ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        body = f"<Error><Code>{self.server.code}</Code></Error>".encode() if self.server.code else b""
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_HEAD = do_DELETE = do_PUT

    def log_message(self, *args: object) -> None:
        """Suppresses the request log."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local HTTP server that receives the requests for `s3://`."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


def test_small_file_is_written_with_a_single_put(server: Server) -> None:
    Storage("s3://bucket/run").write("a.txt", b"content")
    assert server.requests == ["PUT /bucket/run/a.txt"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken"),
        (301, "PermanentRedirect"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operation", OPERATIONS)
def test_permanent_errors_are_not_retried(
    server: Server, operation: str, status: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "WAITS", (10_000,))
    server.status, server.code = status, code
    with pytest.raises(StorageError, match=rf"s3://bucket/run\S* could not be .*({code}|ACCESS|INVALID|SIGN|status)"):
        OPERATIONS[operation](Storage("s3://bucket/run"), tmp_path)
    assert len(server.requests) == 1
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A published policy that no node has fetched yet."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return publish(tmp_path / "adapter", Storage(str(tmp_path / "run")), "policy", 1, "adapter")


def cached_folders(*parts: str) -> list[str]:
    return sorted(file.name for file in cache_folder().joinpath(*parts).iterdir() if file.is_dir())


def backdate(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_policy_of_a_moved_or_altered_run_is_refused(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(CalmRayError, match=rf"{policy.location} does not exist: its run was moved or deleted"):
        policy.local_folder()
    assert cached_folders("policies") == []
    (tmp_path / "moved").rename(tmp_path / "run")
    (tmp_path / "run" / "policy" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(CalmRayError, match=f"{policy.location} has changed since it was written"):
        policy.local_folder()


def test_unused_policies_are_evicted(policy: Policy) -> None:
    folder = policy.local_folder()
    fetch(policy.location, policy.sha256, folder.with_name("r0002-other"))
    for cached in (folder, folder.with_name("r0002-other")):
        backdate(cached, 4_000)
    evict_policies({policy.name})
    assert cached_folders("policies") == [policy.name]
    policy.local_folder()
    evict_policies([])  # used recently
    assert cached_folders("policies") == [policy.name]
    backdate(folder, 4_000)
    evict_policies([])
    assert cached_folders("policies") == []
    assert policy.local_folder() == folder
    assert folder.is_dir()


def test_temporary_folders_of_killed_processes_are_deleted(policy: Policy) -> None:
    folder = policy.local_folder()
    for name, seconds in (("a.tmp-11111111", 100_000), ("b.tmp-22222222", 1_000)):
        folder.with_name(name).mkdir()
        folder.with_name(name).joinpath("weights").write_bytes(b"half")
        backdate(folder.with_name(name), seconds)
    backdate(folder, 100_000)
    with node_lock(folder):
        assert cached_folders("policies") == ["b.tmp-22222222", policy.name]
