"""Machines leave a cluster while engines and training work on them, and others come: the run completes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from small_runs import MOMENTS

from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
ENGINE_CPUS = 3


@pytest.fixture
def cluster(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head too small for an engine, to which a test adds machines."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "a" * 64))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def add_for_engine(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=ENGINE_CPUS, resources={"calm_ray_engine": 1})


def add_for_training(cluster: Cluster) -> Any:
    """A machine that an engine would fill, if it could."""
    return cluster.add_node(num_cpus=ENGINE_CPUS + 1, resources={"calm_ray_train": 2})


def wait_until(job: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while not happened():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)


@pytest.mark.chaos
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_machines_that_leave_and_come(
    cluster: Cluster, make_recipe: Callable[..., Path], tmp_path: Path, moment: int
) -> None:
    sampled, trained = (random.Random(moment).randint(1, most) for most in (16, 2))
    first, _ = add_for_engine(cluster), add_for_engine(cluster)
    trainers = add_for_training(cluster)
    cluster.wait_for_nodes()
    recipe = make_recipe(
        name="nodes", storage=str(tmp_path), sampling={"prompts_per_chunk": 2},
        engines={"shared": 2, "cpus": ENGINE_CPUS}, train={"checkpoint_steps": 2, "cpus_per_worker": 1},
    )  # fmt: skip
    run = RunDirectory(str(tmp_path), "nodes")
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe)]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(job, lambda: len(run.stage(1, "sample").chunks()) >= sampled)
    cluster.remove_node(first, allow_graceful=False)
    wait_until(job, lambda: len(run.stage(1, "train").storage.names("checkpoints")) >= trained)
    cluster.remove_node(trainers, allow_graceful=False)
    add_for_training(cluster)
    add_for_engine(cluster)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "its process or its machine is gone; it is started again" in output
    rows = rows_of(run.stage(1, "sample").read())
    ids = {(row["question_id"], row["language"], row["sample"]) for row in rows}
    assert len(ids) == len(rows) == 24 * 2 * 3
    assert run.is_finished
    steps = [row["step"] for row in run.stage(1, "train").storage.read_json("metrics.json") if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
