"""A run whose storage is an S3-compatible server, which this test starts."""

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
    """What the server was asked, one request a line."""
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def bucket(requests: Path) -> Iterator[str]:
    """The URI of an empty bucket; what reaches it is in the environment, as it would be for a real one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
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
            wait_for(port, server)
            maker, _ = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
            maker.create_dir("bucket")
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert server.poll() is None, "the server did not start"
            time.sleep(0.1)


def keys(storage: Storage) -> set[str]:
    """All objects under the storage's root; a name that ends in a slash only says that there is a folder."""
    found = storage.filesystem.get_file_info(fs.FileSelector(storage.path(), recursive=True))
    return {info.path.removeprefix(f"{storage.path()}/") for info in found if info.is_file}


def test_files_and_folders(bucket: str, tmp_path: Path) -> None:
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


def test_tables(bucket: str) -> None:
    storage = Storage(f"{bucket}/tables")
    data = pa.table({"x": list(range(1000)), "y": ["a"] * 1000})
    storage.write_table("round=1/0.parquet", data)
    assert storage.read_table("round=1/0.parquet").equals(data)
    assert storage.read_table("round=1/0.parquet", ["x"]).column_names == ["x"]
    with pytest.raises(FileNotFoundError):
        storage.read_table("round=1/1.parquet")


def test_folders_come_back_as_they_went(bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "empty").write_bytes(b"")
    (source / "weights").write_bytes(bytes(range(256)) * 50_000)  # more than one part of an upload
    storage = Storage(f"{bucket}/folders")
    storage.upload(source, "policy")
    storage.under("policy").download("", tmp_path / "target")
    assert hash_folder(tmp_path / "target") == hash_folder(source)
    assert [folder.name for folder in tmp_path.iterdir() if folder != source] == ["target"]


def test_small_files_are_single_puts(bucket: str, requests: Path) -> None:
    storage = Storage(f"{bucket}/puts")
    storage.write("small", b"content")
    storage.write("large", bytes(12 << 20))
    asked = [line.split('"')[1].split() for line in requests.read_text().splitlines() if "/bucket/puts/" in line]
    assert [(method, path) for method, path, _ in asked if "small" in path] == [("PUT", "/bucket/puts/small")]
    assert len(asked) > 2
    assert len(storage.read("large")) == 12 << 20


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"s3://none/runs/a could not be written.*NO_SUCH_BUCKET"):
        Storage("s3://none/runs").write("a", b"")


def test_no_lock_file_is_left_in_a_bucket(bucket: str) -> None:
    storage = Storage(f"{bucket}/locks/run")
    with locked(storage, print), locked(storage, print):  # the lock within a cluster is all there is
        assert Storage(f"{bucket}/locks").names() == []


def start_job(recipe: Path) -> subprocess.Popen[str]:
    """In a process of its own, whose Ray hands the environment to its workers."""
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_is_interrupted_and_gone_on_with(
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
    assert "is finished" in capsys.readouterr().out
    assert main(["show", run.uri]) == 0
    assert "completions, round 1" in capsys.readouterr().out
    assert main(["export", run.uri, str(tmp_path / "merged")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
