"""Storage and whole runs on a local S3-compatible server (moto)."""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs
from transformers import AutoModelForCausalLM

from calm_ray.cli import main
from calm_ray.core.errors import StorageError
from calm_ray.run.directory import RunDirectory
from calm_ray.run.lock import locked
from calm_ray.run.storage import Storage, hash_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's log, one request per line."""
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def bucket(requests: Path) -> Iterator[str]:
    """The URI of an empty bucket. Endpoint and credentials are in the environment, as for a real one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with open(requests, "wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            wait_for_server(port, server)
            filesystem, _ = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
            filesystem.create_dir("bucket")
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()


def wait_for_server(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert server.poll() is None, "the server did not start"
            time.sleep(0.1)


def keys(storage: Storage) -> set[str]:
    """Keys of all objects under the storage's root, without folder markers."""
    found = storage.filesystem.get_file_info(fs.FileSelector(storage.path(), recursive=True))
    return {info.path.removeprefix(f"{storage.path()}/") for info in found if info.is_file}


def test_reading_writing_and_deleting_files(bucket: str, tmp_path: Path) -> None:
    storage = Storage(f"{bucket}/files/run")
    assert not storage.is_local
    assert storage.names() == storage.files("none") == []
    storage.write("a/one.txt", b"1")
    storage.write("a/one.txt", b"one")
    storage.write("a/empty", b"")
    storage.write("a/b/two.txt", b"two")
    storage.write_json("three.json", {"x": "ü"})
    assert storage.read("a/one.txt") == b"one"
    assert storage.read_json("three.json") == {"x": "ü"}
    assert (storage.exists("a/one.txt"), storage.exists("a"), storage.exists("a/one")) == (True, True, False)
    assert storage.files("a") == ["empty", "one.txt"]
    assert storage.names() == ["a", "three.json"]
    other = pickle.loads(pickle.dumps(storage.under("a")))
    assert other.uri("b") == f"{bucket}/files/run/a/b"
    assert other.read("b/two.txt") == b"two"
    assert keys(storage) == {"a/one.txt", "a/empty", "a/b/two.txt", "three.json"}
    storage.delete("a/none")
    storage.delete("a/one.txt")
    assert storage.files("a") == ["empty"]
    storage.delete("a")
    assert storage.names() == ["three.json"]
    storage.delete("")
    assert not storage.exists("")


def test_reading_and_writing_tables(bucket: str) -> None:
    storage = Storage(f"{bucket}/tables")
    data = pa.table({"x": list(range(1000)), "y": ["a"] * 1000})
    storage.write_table("round=1/0.parquet", data)
    assert storage.read_table("round=1/0.parquet").equals(data)
    assert storage.read_table("round=1/0.parquet", ["x"]).column_names == ["x"]
    with pytest.raises(FileNotFoundError):
        storage.read_table("round=1/1.parquet")


def test_folder_is_unchanged_by_upload_and_download(bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "empty").write_bytes(b"")
    (source / "weights").write_bytes(bytes(range(256)) * 50_000)  # more than one part of an upload
    storage = Storage(f"{bucket}/folders")
    storage.upload(source, "policy")
    storage.under("policy").download("", tmp_path / "target")
    assert hash_folder(tmp_path / "target") == hash_folder(source)
    assert [folder.name for folder in tmp_path.iterdir() if folder != source] == ["target"]


def test_small_files_take_a_single_put(bucket: str, requests: Path) -> None:
    storage = Storage(f"{bucket}/puts")
    storage.write("small", b"content")
    storage.write("large", bytes(12 << 20))
    received = [line.split('"')[1].split() for line in requests.read_text().splitlines() if "/bucket/puts/" in line]
    assert [(method, path) for method, path, _ in received if "small" in path] == [("PUT", "/bucket/puts/small")]
    assert len(received) > 2
    assert len(storage.read("large")) == 12 << 20


def test_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"s3://none/runs/a could not be written.*NO_SUCH_BUCKET"):
        Storage("s3://none/runs").write("a", b"")


def test_buckets_have_no_lock_files(bucket: str) -> None:
    storage = Storage(f"{bucket}/locks/run")
    with locked(storage, print), locked(storage, print):  # only the lock within a cluster applies
        assert Storage(f"{bucket}/locks").names() == []


def start_job(recipe: Path) -> subprocess.Popen[str]:
    """Starts the run in a new process, whose Ray passes the environment on to its workers."""
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_interrupted_run_resumes(
    bucket: str, make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(name="small", storage=f"{bucket}/runs", train={"workers": 1})
    run = RunDirectory(f"{bucket}/runs", "small")
    job = start_job(recipe)
    while job.poll() is None and not run.stage(1, "pairs").is_finished:
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate()
    assert job.returncode == 130, output
    finished = ("questions", "rounds/0", "rounds/1/sample", "rounds/1/pairs")
    before = {key: run.storage.read(key) for key in keys(run.storage) if key.startswith(finished)}
    assert "rounds/1/pairs/stage.json" in before
    job = start_job(recipe)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert {key: run.storage.read(key) for key in before} == before
    assert [entry["round"] for entry in run.summary["rounds"]] == [0, 1]
    assert not [key for key in keys(run.storage) if "tmp" in key]
    assert main(["align", str(recipe)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["show", run.uri]) == 0
    assert "completions, round 1" in capsys.readouterr().out
    assert main(["export", run.uri, str(tmp_path / "merged")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
