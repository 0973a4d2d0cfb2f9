"""Training that survives: killed workers, nodes that go, nodes that are about to go."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
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


def job_of(inputs: Path, output: Path, **changes: Any) -> TrainJob:
    """120 steps, unless `epochs` says otherwise: 6 in each of 20 epochs."""
    settings = {
        "learning_rate": 1e-3, "warmup_share": 0.1, "epochs": 20, "batch_pairs": 8, "dtype": "float32",
        "cpus_per_worker": 0.5, "validation_share": 0.0, "pack_tokens": 200, "checkpoint_steps": 2, "workers": 2,
        **changes,
    }  # fmt: skip
    pairs, stage, base = Stage(Storage(str(inputs / "pairs"))), Stage(Storage(str(output))), Policy()
    return TrainJob(pairs, stage, RunModel(str(inputs / "model")), base, base, Train(**settings), DPO(0.1), 0, 1)


def metrics(output: Path) -> Rows:
    return list(json.loads((output / "metrics.json").read_text()))


def curve(rows: Rows) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows if "train/loss" in row]


def training_processes() -> list[psutil.Process]:
    """Ray Train's workers that this process's own Ray started."""
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
    """Collects what is reported, and does something once when a step is reported."""

    step: int
    then: Callable[[], Any]
    rows: Rows = field(default_factory=list)
    is_done: bool = False

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.is_done and row.get("step", 0) >= self.step:
            self.is_done = True
            self.then()

    def of(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]


def kill_one() -> None:
    victims = training_processes()
    assert len(victims) == 2
    victims[-1].send_signal(signal.SIGKILL)


@pytest.mark.usefixtures("ray_8_cpus")
def test_a_killed_worker_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    train_round(job_of(inputs, tmp_path / "undisturbed"), "cpu", lambda row: None)
    watch = Watch(7, kill_one)
    train_round(job_of(inputs, tmp_path / "killed"), "cpu", watch)
    expected, found = metrics(tmp_path / "undisturbed"), metrics(tmp_path / "killed")
    assert len(watch.of("resumed")) == 1
    assert watch.of("resumed")[0] >= 2
    assert steps(found) == steps(watch.rows) == list(range(1, 121))
    furthest = max(abs(a - b) for a, b in zip(curve(found), curve(expected), strict=True))
    print(f"resumed from {watch.of('resumed')}; curves differ by {furthest:.1e}")
    assert furthest < 1e-4
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.usefixtures("ray_8_cpus")
@pytest.mark.chaos
def test_workers_may_be_lost_again_when_training_has_come_further(inputs: Path, tmp_path: Path) -> None:
    first, second = Watch(7, kill_one), Watch(0, kill_one)

    def report(row: dict[str, Any]) -> None:
        first(row)
        if "resumed" in row:
            second.step = row["resumed"] + 6  # three checkpoints later
        if first.of("resumed"):
            second(row)

    train_round(job_of(inputs, tmp_path, max_failures=0), "cpu", report)
    assert len(first.of("resumed")) == len(first.of("lost")) == 2
    assert steps(first.rows) == steps(metrics(tmp_path)) == list(range(1, 121))


@pytest.mark.usefixtures("ray_8_cpus")
def test_a_hopeless_error_is_not_tried_again(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "reference.parquet").mkdir()  # where a file must go
    rows: Rows = []
    with pytest.raises(StorageError, match=r"reference\.parquet could not be written"):
        train_round(job_of(inputs, tmp_path), "cpu", rows.append)
    assert rows == []  # a worker that is started anew is told of


@pytest.mark.usefixtures("ray_8_cpus")
def test_elastic_workers_need_places(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ray start --resources"):
        train_round(job_of(inputs, tmp_path, workers=(1, 2)), "cpu", lambda row: None)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a function in a process of its own, which may start a cluster of several nodes beside the tests' Ray."""
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need short paths
    monkeypatch.setenv("RAY_TMPDIR", str(home))  # where the cluster's address is left for who looks for one
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
    """A node for the driver alone."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster


def add_place(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, resources={TRAIN_SLOT: 1})


def drain(cluster: Cluster, node: Any) -> None:
    """What a cloud's notice that it takes a machine back leads to."""
    in_a_minute = int(time.time() * 1000) + 60_000
    preemption = 2  # DRAIN_NODE_REASON_PREEMPTION
    client = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]
    accepted, why = client.drain_node(node.node_id, preemption, "taken back", in_a_minute)
    assert accepted, why


def whole_steps(output: Path) -> list[int]:
    return sorted(int(file.parent.name) for file in output.glob("checkpoints/*/checkpoint.json"))


def train_on_a_drained_node(inputs: Path, output: Path) -> None:
    cluster = start_cluster()
    nodes = [add_place(cluster) for _ in range(2)]
    noticed: list[tuple[int, list[int]]] = []

    def busy_node() -> Any:
        free = available_resources_per_node()
        (node,) = (node for node in nodes if not free[node.node_id].get(TRAIN_SLOT))
        return node

    watch = Watch(5, lambda: drain(cluster, busy_node()))

    def report(row: dict[str, Any]) -> None:
        watch(row)
        if "noticed" in row:
            noticed.append((row["noticed"], whole_steps(output)))
            cluster.remove_node(busy_node(), allow_graceful=False)

    # Without the notice there would be a checkpoint at the end of each epoch alone, every 48 steps.
    train_round(job_of(inputs, output, workers=1, batch_pairs=1, epochs=4, checkpoint_steps=1000), "cpu", report)
    ((step, there),) = noticed
    assert step > 5
    assert there[-1] >= step
    print(f"notice after step 5, checkpoint of step {step}, went on from {watch.of('resumed')}")
    assert len(watch.of("resumed")) == 1
    assert watch.of("resumed")[0] >= step
    assert steps(watch.rows) == steps(metrics(output)) == list(range(1, 193))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_a_drained_node_leaves_a_checkpoint(inputs: Path, tmp_path: Path, apart: Callable[..., None]) -> None:
    apart(train_on_a_drained_node, inputs, tmp_path)


class Worlds:
    """Collects what is reported, and how many workers wrote each checkpoint."""

    def __init__(self, output: Path, watch: Watch) -> None:
        self._output, self._watch = output, watch
        self.sizes: list[int] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self._watch(row)
        for step in whole_steps(self._output)[-1:]:
            try:
                written = json.loads((self._output / f"checkpoints/{step:08d}/checkpoint.json").read_text())
            except FileNotFoundError:  # there is a newer one by now
                continue
            self.sizes.append(written["workers"])


def train_on_fewer_nodes(inputs: Path, output: Path) -> None:
    cluster = start_cluster()
    nodes = [add_place(cluster) for _ in range(2)]
    watch = Watch(7, lambda: cluster.remove_node(nodes[1], allow_graceful=False))
    worlds = Worlds(output, watch)
    train_round(job_of(inputs, output, workers=(1, 2)), "cpu", worlds)
    assert len(watch.of("resumed")) == 1
    assert worlds.sizes == sorted(worlds.sizes, reverse=True)
    assert set(worlds.sizes) == {1, 2}
    assert steps(watch.rows) == steps(metrics(output)) == list(range(1, 121))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_elastic_workers_go_on_with_the_nodes_that_are_left(
    inputs: Path, tmp_path: Path, apart: Callable[..., None]
) -> None:
    apart(train_on_fewer_nodes, inputs, tmp_path)


def train_on_more_nodes(inputs: Path, output: Path) -> None:
    workers.RESIZE_SECONDS = 2.0  # in this process alone
    cluster = start_cluster()
    add_place(cluster)
    reached = threading.Event()
    watch = Watch(7, reached.set)
    worlds = Worlds(output, watch)
    job = job_of(inputs, output, workers=(1, 2), batch_pairs=1, epochs=30, checkpoint_steps=20)
    with ThreadPoolExecutor() as pool:
        training = pool.submit(train_round, job, "cpu", worlds)
        while not reached.wait(1):
            assert not training.done()
        add_place(cluster)  # only a main thread can start a node
        training.result()
    assert len(watch.of("resumed")) == 1
    assert worlds.sizes == sorted(worlds.sizes)
    assert set(worlds.sizes) == {1, 2}
    assert steps(watch.rows) == steps(metrics(output)) == list(range(1, 48 * 30 + 1))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.chaos
def test_elastic_workers_take_in_a_node_that_comes(inputs: Path, tmp_path: Path, apart: Callable[..., None]) -> None:
    apart(train_on_more_nodes, inputs, tmp_path)
