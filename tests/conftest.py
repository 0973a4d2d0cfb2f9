"""Row factories and the data folder, for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data, for tests that need it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CALM_RAY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data: set CALM_RAY_DATA to its folder ({folder} is not there)")
    return folder
