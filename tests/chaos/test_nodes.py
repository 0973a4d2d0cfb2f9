"""Removes nodes from a cluster while engines and training use them, and adds others: the run completes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import logged_steps, policy_of_each_completion, progress, start_head, start_run, wait_until
from ray.cluster_utils import Cluster
from small_runs import MOMENTS

from calm_ray.run.directory import RunDirectory

ENGINE_CPUS = 3


@pytest.fixture
def cluster(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head node too small for an engine; tests add nodes."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", "a" * 64))
    cluster = start_head()
    yield cluster
    cluster.shutdown()


def add_engine_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=ENGINE_CPUS, resources={"calm_ray_engine": 1})


def add_training_node(cluster: Cluster) -> Any:
    """Adds a node with enough CPUs for an engine, but only training slots."""
    return cluster.add_node(num_cpus=ENGINE_CPUS + 1, resources={"calm_ray_train": 2})


@pytest.mark.chaos
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_run_completes_while_nodes_leave_and_join(
    cluster: Cluster, make_recipe: Callable[..., Path], tmp_path: Path, moment: int
) -> None:
    chunks, checkpoints = (random.Random(moment).randint(1, most) for most in (16, 2))
    engine_node, _ = add_engine_node(cluster), add_engine_node(cluster)
    training_node = add_training_node(cluster)
    cluster.wait_for_nodes()
    recipe = make_recipe(
        name="nodes", storage=str(tmp_path), sampling={"prompts_per_chunk": 2},
        engines={"shared": 2, "cpus": ENGINE_CPUS}, train={"checkpoint_steps": 2, "cpus_per_worker": 1},
    )  # fmt: skip
    run = RunDirectory(str(tmp_path), "nodes")
    job = start_run(recipe, env={**os.environ, "RAY_ADDRESS": cluster.address})
    wait_until(job, lambda: progress(run, "1/sample") >= chunks)
    cluster.remove_node(engine_node, allow_graceful=False)
    wait_until(job, lambda: progress(run, "1/train") >= checkpoints)
    cluster.remove_node(training_node, allow_graceful=False)
    add_training_node(cluster)
    add_engine_node(cluster)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "its process or node was lost; restarting it" in output
    assert len(policy_of_each_completion(run.stage(1, "sample"))) == 24 * 2 * 3
    assert run.is_finished
    steps = logged_steps(run.stage(1, "train").storage.read_json("metrics.json"))
    assert steps == list(range(1, len(steps) + 1))
