from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(cache: Path) -> None:
    """Whatever runs here keeps its models and policies in the tests' own cache."""
