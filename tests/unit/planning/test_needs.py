"""Resources that a run needs, and why a cluster may lack them."""

from __future__ import annotations

from typing import Any

from calm_ray.cluster.resources import shortage
from calm_ray.planning.needs import needs_of
from calm_ray.recipes.load import load_config

A100_NODE = {"CPU": 96.0, "GPU": 8.0}


def needs(*overrides: str, training: bool = True) -> Any:
    return needs_of(load_config("llama3_8b", list(overrides)), training)


def test_engines_and_workers_add_up() -> None:
    assert needs().total == {"CPU": 14.0, "GPU": 14.0}
    assert needs(training=False).total == {"CPU": 6.5, "GPU": 6.0}  # engines, and a data task
    assert needs("engines.tensor_parallel_size=2").total == {"CPU": 20.0, "GPU": 20.0}
    assert needs_of(load_config(None)).total["GPU"] == 0


def test_published_recipe_fits_on_two_nodes_with_eight_gpus() -> None:
    assert shortage(needs(), {"CPU": 192.0, "GPU": 16.0}, [A100_NODE]) is None
    problem = shortage(needs(), {"CPU": 96.0, "GPU": 8.0}, [A100_NODE])
    assert problem is not None
    assert "14 GPU (the cluster has at most 8)" in problem


def test_engine_must_fit_on_one_node() -> None:
    oversized = needs("engines={shared: 1, per_language: null, tensor_parallel_size: 16}")
    problem = shortage(oversized, {"CPU": 768.0, "GPU": 64.0}, [{"CPU": 8.0}, A100_NODE])
    assert problem is not None
    assert "16 GPU on one node" in problem
    assert "engines.tensor_parallel_size" in problem
