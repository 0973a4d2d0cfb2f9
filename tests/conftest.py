"""Machine-dependent test setup: GPUs and the folder of real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

pytest_plugins = ["small_runs"]

# Background shells ignore SIGINT, and the jobs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# With tests running side by side, `ray.init()` must not find the cluster that a test in another process has started.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["RAY_TMPDIR"] = f"/tmp/ray-{worker}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `@pytest.mark.gpu(n)` on machines with fewer than n GPUs."""
    for marker in item.iter_markers("gpu"):
        (needed,) = marker.args
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPU(s), found {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data; tests that use it are skipped without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CALM_RAY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data: {folder} not found; set CALM_RAY_DATA")
    return folder
