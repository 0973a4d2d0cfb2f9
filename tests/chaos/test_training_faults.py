"""Training survives killed workers, and nodes that are lost, drained or added."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from factories import pairs_stage, tiny_model
from faults import kill, logged_steps, start_head
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster

from calm_ray.cluster.resources import TRAIN_SLOT
from calm_ray.core.errors import InputError, StorageError
from calm_ray.core.sections import Train
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training import workers
from calm_ray.training.job import TrainJob
from calm_ray.training.objectives import DPO
from calm_ray.training.workers import train_round

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model")
    pairs_stage(folder / "pairs")
    return folder


def train_job(inputs: Path, output: Path, **changes: Any) -> TrainJob:
    """By default 120 steps: 20 epochs of 6."""
    settings = {
        "learning_rate": 1e-3, "warmup_ratio": 0.1, "epochs": 20, "batch_pairs": 8, "dtype": "float32",
        "cpus_per_worker": 0.5, "validation_fraction": 0.0, "pack_tokens": 200, "checkpoint_steps": 2, "workers": 2,
        **changes,
    }  # fmt: skip
    pairs, stage, base = Stage(Storage(str(inputs / "pairs"))), Stage(Storage(str(output))), Policy()
    return TrainJob(pairs, stage, RunModel(str(inputs / "model")), base, base, Train(**settings), DPO(0.1), 0, 1)


def saved_metrics(output: Path) -> Rows:
    return list(json.loads((output / "metrics.json").read_text()))


def losses(rows: Rows) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def worker_processes() -> list[psutil.Process]:
    """Ray Train workers under this process, not those of other Ray instances."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Watch:
    """Collects the reported rows, and calls `action` once, when `step` is reached."""

    step: int
    action: Callable[[], Any]
    rows: Rows = field(default_factory=list)
    has_acted: bool = False

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.has_acted and row.get("step", 0) >= self.step:
            self.has_acted = True
            self.action()

    def of(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]


def kill_one_of_two_workers() -> None:
    processes = worker_processes()
    assert len(processes) == 2
    kill(processes[-1:])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_killed_worker_does_not_change_the_result(inputs: Path, tmp_path: Path) -> None:
    train_round(train_job(inputs, tmp_path / "undisturbed"), "cpu", lambda row: None)
    watch = Watch(7, kill_one_of_two_workers)
    train_round(train_job(inputs, tmp_path / "killed"), "cpu", watch)
    expected, found = saved_metrics(tmp_path / "undisturbed"), saved_metrics(tmp_path / "killed")
    assert len(watch.of("resumed")) == 1
    assert watch.of("resumed")[0] >= 2
    assert logged_steps(found) == logged_steps(watch.rows) == list(range(1, 121))
    difference = max(abs(a - b) for a, b in zip(losses(found), losses(expected), strict=True))
    print(f"resumed from step {watch.of('resumed')}; losses differ by up to {difference:.1e}")
    assert difference < 1e-4
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.usefixtures("ray_8_cpus")
@pytest.mark.chaos
def test_failure_count_resets_when_training_makes_progress(inputs: Path, tmp_path: Path) -> None:
    first, second = Watch(7, kill_one_of_two_workers), Watch(0, kill_one_of_two_workers)

    def report(row: dict[str, Any]) -> None:
        first(row)
        if "resumed" in row:
            second.step = row["resumed"] + 6  # three checkpoints later
        if first.of("resumed"):
            second(row)

    train_round(train_job(inputs, tmp_path, max_failures=0), "cpu", report)
    assert len(first.of("resumed")) == len(first.of("lost")) == 2
    assert logged_steps(first.rows) == logged_steps(saved_metrics(tmp_path)) == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_permanent_error_is_not_retried(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "reference.parquet").mkdir()  # blocks the file of that name
    rows: Rows = []
    with pytest.raises(StorageError, match=r"reference\.parquet could not be written"):
        train_round(train_job(inputs, tmp_path), "cpu", rows.append)
    assert not any("lost" in row for row in rows)


@pytest.mark.usefixtures("ray_8_cpus")
def test_elastic_workers_need_training_slots(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ray start --resources"):
        train_round(train_job(inputs, tmp_path, workers=(1, 2)), "cpu", lambda row: None)


@pytest.fixture
def in_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a function in a new process, where it can start a cluster without touching the tests' own Ray."""
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need short paths
    monkeypatch.setenv("RAY_TMPDIR", str(home))  # also where Ray writes the address of the current cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")

    def run(function: Callable[..., None], *arguments: Any) -> None:
        process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0

    yield run
    shutil.rmtree(home, ignore_errors=True)


def start_cluster() -> Cluster:
    """Starts a cluster and connects to it. Its head node only has room for the driver."""
    cluster = start_head()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster


def add_training_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, resources={TRAIN_SLOT: 1})


def drain(cluster: Cluster, node: Any) -> None:
    """Announces the node's preemption in a minute, as a cloud's notice would."""
    deadline_ms = int(time.time() * 1000) + 60_000
    preemption = 2  # DRAIN_NODE_REASON_PREEMPTION
    client = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]
    accepted, reason = client.drain_node(node.node_id, preemption, "preempted", deadline_ms)
    assert accepted, reason


def saved_steps(output: Path) -> list[int]:
    return sorted(int(file.parent.name) for file in output.glob("checkpoints/*/checkpoint.json"))


def train_on_a_drained_node(inputs: Path, output: Path) -> None:
    cluster = start_cluster()
    nodes = [add_training_node(cluster) for _ in range(2)]
    noticed: list[tuple[int, list[int]]] = []

    def busy_node() -> Any:
        free = available_resources_per_node()
        (node,) = (node for node in nodes if not free[node.node_id].get(TRAIN_SLOT))
        return node

    watch = Watch(5, lambda: drain(cluster, busy_node()))

    def report(row: dict[str, Any]) -> None:
        watch(row)
        if "noticed" in row:
            noticed.append((row["noticed"], saved_steps(output)))
            cluster.remove_node(busy_node(), allow_graceful=False)

    # Without the notice, the only checkpoints are at the end of each epoch, every 48 steps.
    train_round(train_job(inputs, output, workers=1, batch_pairs=1, epochs=4, checkpoint_steps=1000), "cpu", report)
    ((step, saved),) = noticed
    assert step > 5
    assert saved[-1] >= step
    print(f"drained after step 5, saved step {step}, resumed from step {watch.of('resumed')}")
    assert len(watch.of("resumed")) == 1
    assert watch.of("resumed")[0] >= step
    assert logged_steps(watch.rows) == logged_steps(saved_metrics(output)) == list(range(1, 193))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_training_saves_a_checkpoint_before_a_preemption(
    inputs: Path, tmp_path: Path, in_new_process: Callable[..., None]
) -> None:
    in_new_process(train_on_a_drained_node, inputs, tmp_path)


class WorldSizes:
    """Passes rows on to a Watch, and records how many workers wrote the newest checkpoint."""

    def __init__(self, output: Path, watch: Watch) -> None:
        self._output, self._watch = output, watch
        self.sizes: list[int] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self._watch(row)
        for step in saved_steps(self._output)[-1:]:
            try:
                written = json.loads((self._output / f"checkpoints/{step:08d}/checkpoint.json").read_text())
            except FileNotFoundError:  # already replaced by a newer one
                continue
            self.sizes.append(written["workers"])


def train_on_fewer_nodes(inputs: Path, output: Path) -> None:
    cluster = start_cluster()
    nodes = [add_training_node(cluster) for _ in range(2)]
    watch = Watch(7, lambda: cluster.remove_node(nodes[1], allow_graceful=False))
    world_sizes = WorldSizes(output, watch)
    train_round(train_job(inputs, output, workers=(1, 2)), "cpu", world_sizes)
    assert len(watch.of("resumed")) == 1
    assert world_sizes.sizes == sorted(world_sizes.sizes, reverse=True)
    assert set(world_sizes.sizes) == {1, 2}
    assert logged_steps(watch.rows) == logged_steps(saved_metrics(output)) == list(range(1, 121))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_elastic_training_continues_on_the_remaining_nodes(
    inputs: Path, tmp_path: Path, in_new_process: Callable[..., None]
) -> None:
    in_new_process(train_on_fewer_nodes, inputs, tmp_path)


def train_on_more_nodes(inputs: Path, output: Path) -> None:
    workers.RESIZE_SECONDS = 2.0  # only affects this process
    cluster = start_cluster()
    add_training_node(cluster)
    reached = threading.Event()
    watch = Watch(7, reached.set)
    world_sizes = WorldSizes(output, watch)
    job = train_job(inputs, output, workers=(1, 2), batch_pairs=1, epochs=30, checkpoint_steps=20)
    with ThreadPoolExecutor() as pool:
        training = pool.submit(train_round, job, "cpu", world_sizes)
        while not reached.wait(1):
            assert not training.done()
        add_training_node(cluster)  # Ray can only start nodes from the main thread
        training.result()
    assert len(watch.of("resumed")) == 1
    assert world_sizes.sizes == sorted(world_sizes.sizes)
    assert set(world_sizes.sizes) == {1, 2}
    assert logged_steps(watch.rows) == logged_steps(saved_metrics(output)) == list(range(1, 48 * 30 + 1))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_elastic_training_uses_added_nodes(inputs: Path, tmp_path: Path, in_new_process: Callable[..., None]) -> None:
    in_new_process(train_on_more_nodes, inputs, tmp_path)
