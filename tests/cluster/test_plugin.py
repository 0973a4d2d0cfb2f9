"""The example method of docs/architecture.md as a plug-in package: planned, run and shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
PLUGIN = {"method": "shorter:SHORTER", "plugins": ["shorter"], "short": {"difference": 2}}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's example as the package `shorter`."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    file = tmp_path_factory.mktemp("plugins") / "shorter" / "__init__.py"
    file.parent.mkdir()
    file.write_text(source)
    return file


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Path], storage: Path) -> Path:
    return make_recipe(name="shorter", storage=str(storage), **PLUGIN)


def calm_ray(package: Path, *arguments: str | Path, code: int = 0) -> str:
    """Runs the command line with the package on its path, checks its exit code and returns the output."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "calm-ray"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parents[1]), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def run(package: Path, recipe: Path, storage: Path) -> RunDirectory:
    calm_ray(package, "align", recipe)
    return RunDirectory(str(storage), "shorter")


def test_plugin_runs_only_if_the_recipe_allows_it(package: Path, recipe: Path) -> None:
    output = calm_ray(package, "align", "--dry-run", recipe, "plugins=[]", code=2)
    assert "plugins: [shorter]" in output
    assert "Traceback" not in output


def test_plan_counts_the_plugins_pairs(package: Path, recipe: Path) -> None:
    """At most one pair per question and language: 24 questions, two languages."""
    plan = json.loads(calm_ray(package, "plan", recipe, "--json"))
    pairs = plan["round"]["steps"]["pairs"]
    assert (pairs["rows"], pairs["unit"]) == (48, "pairs")
    assert plan["round"]["steps"]["train"]["rows"] == 48


@pytest.mark.slow
def test_round_trains_on_the_plugins_pairs(run: RunDirectory) -> None:
    rows = rows_of(run.stage(1, "pairs").read())
    assert rows
    assert all(len(row["rejected_token_ids"]) - len(row["chosen_token_ids"]) >= 2 for row in rows)
    assert run.summary["rounds"][1]["pairs"] == len(rows)
    policy = run.policy(1)
    assert policy.name != "base"
    assert {row["policy"] for row in rows_of(run.stage(1, "evaluate").read())} == {policy.name}


@pytest.mark.slow
def test_changed_plugin_source_invalidates_the_run(package: Path, recipe: Path, run: RunDirectory) -> None:
    (name, fingerprint), *others = run.storage.read_json("config.json")["config"]["plugins"].items()
    assert (name, others) == ("shorter", [])
    assert len(fingerprint["sha256"]) == 64
    source = package.read_text()
    package.write_text(source.replace("chosen=own[0], rejected=own[-1]", "chosen=own[-1], rejected=own[0]"))
    try:
        output = calm_ray(package, "align", recipe, code=2)
    finally:
        package.write_text(source)
    assert "plugins.shorter.sha256" in output
    assert "--redo" in output
    assert "already finished" in calm_ray(package, "align", recipe)


@pytest.mark.slow
def test_changed_plugin_setting_invalidates_its_step(package: Path, recipe: Path, run: RunDirectory) -> None:
    output = calm_ray(package, "align", recipe, "short.difference=3", code=2)
    assert "short.difference: 2 in the run, 3 in the recipe" in output
    assert "--redo" in output


@pytest.mark.slow
def test_show_needs_permission_to_run_the_plugin(package: Path, run: RunDirectory) -> None:
    assert "--plugins shorter" in calm_ray(package, "show", run.uri, code=2)
    output = calm_ray(package, "show", run.uri, "--plugins", "shorter")
    assert "chosen" in output
    assert "rejected" in output
