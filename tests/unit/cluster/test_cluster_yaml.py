"""Checks of cluster.yaml that need no cloud."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]
REMOTE_HOME = "~/calm_ray/"


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def test_ray_accepts_cluster_yaml(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)  # as `ray up` does before contacting the cloud; adds Ray's AWS defaults
    validate_config(prepared)
    workers = prepared["available_node_types"]["a100x8"]
    assert (workers["min_workers"], workers["max_workers"], prepared["max_workers"]) == (0, 8, 8)


def test_ray_refuses_unknown_fields(cluster: dict[str, Any]) -> None:
    """Shows that the test above can fail."""
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config({**cluster, "idle_minutes": 5}))


def test_storage_is_exported_before_ray_starts(cluster: dict[str, Any]) -> None:
    [line] = [command for command in cluster["setup_commands"] if "CALM_RAY_STORAGE" in command]
    assert "export CALM_RAY_STORAGE=/shared/runs " in line
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert cluster[key][-1].startswith("ulimit -n 65536; ray start ")


def test_setup_installs_from_the_mounted_files(cluster: dict[str, Any], tmp_path: Path) -> None:
    for remote, local in cluster["file_mounts"].items():
        source, target = ROOT / local, tmp_path / remote.removeprefix(REMOTE_HOME)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    assert {"calm_ray", "jobs"} <= {path.name for path in tmp_path.iterdir()}

    [install] = [command for command in cluster["setup_commands"] if command.startswith("make ")]
    dry_run = install.replace(REMOTE_HOME.rstrip("/"), str(tmp_path)).split()
    result = subprocess.run([*dry_run, "--dry-run"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "-r requirements/cuda.txt" in result.stdout
    assert "-e ." in result.stdout
