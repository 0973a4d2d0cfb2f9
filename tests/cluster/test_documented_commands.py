"""The documentation's commands, on real runs that stand where the demos' would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documented import ROOT, calm_ray_commands, reads_a_run, starts_a_run

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Path]) -> Path:
    """A home folder with small runs by the names of the two demos: CALM with two rounds, and DCO."""
    folder = tmp_path_factory.mktemp("home")
    storage = str(folder / "calm_ray" / "runs")
    engines = {"per_language": 1, "shared": None, "refresh": "adapter"}
    run(folder, "align", str(make_recipe(name="demo", storage=storage, rounds=2, engines=engines)))
    candidates = {"form": "choices", "pairs": 2}
    run(folder, "align", str(make_recipe(name="dco-demo", storage=storage, method="dco", candidates=candidates)))
    return folder


def run(home: Path, *arguments: str) -> str:
    """Runs `calm-ray` as a user would, in a home folder of its own."""
    done = subprocess.run(
        [str(BIN / "calm-ray"), *(word.replace("~", str(home)) for word in arguments)],
        capture_output=True, text=True, cwd=home, env={**os.environ, "HOME": str(home)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [words for words in calm_ray_commands() if reads_a_run(words)], ids=" ".join)
def test_command_works_on_a_finished_run(home: Path, arguments: list[str]) -> None:
    assert run(home, *arguments).strip()


def test_both_demos_align(tmp_path: Path) -> None:
    """As the README shows them: held-out accuracy and agreement rise."""
    assert ["align", "demo"] in [words for words in calm_ray_commands() if starts_a_run(words)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["make", "demo"], cwd=ROOT, env=environment, check=True)
    subprocess.run([sys.executable, "jobs/dco.py"], cwd=ROOT, env=environment, check=True)
    calm, dco = (
        json.loads((tmp_path / "calm_ray" / "runs" / name / "summary.json").read_text())["rounds"]
        for name in ("demo", "dco-demo")
    )
    assert calm[2]["accuracy_mean"] > calm[0]["accuracy_mean"] + 0.03
    assert calm[2]["consistency"]["2"] > calm[0]["consistency"]["2"] + 0.03
    assert dco[1]["rankc_mean"] > dco[0]["rankc_mean"] + 0.05
