"""What tests need of the machine: the folder of real data, GPUs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

pytest_plugins = ["small_runs"]

# In the background of a shell, tests inherit that Ctrl-C is ignored, and so would the jobs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.gpu(n)`: skipped where there are fewer GPUs."""
    for marker in item.iter_markers("gpu"):
        (needed,) = marker.args
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPU(s), there are {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data, for tests that need it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CALM_RAY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data: set CALM_RAY_DATA to its folder ({folder} is not there)")
    return folder
