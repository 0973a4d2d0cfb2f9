"""The method of docs/architecture.md, in a package outside calm_ray: planned, run, killed, resumed, shown."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
OWN = {"method": "shorter:SHORTER", "plugins": ["shorter"], "short": {"difference": 2}}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the page shows, as the package `shorter`."""
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
    return make_recipe(name="shorter", storage=str(storage), **OWN)


def start(package: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "calm-ray"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parents[1]), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def command(package: Path, *arguments: str | Path, code: int = 0) -> str:
    process = start(package, *arguments)
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def resumed(package: Path, recipe: Path, storage: Path) -> RunDirectory:
    """A run whose driver, with all that it had started, was killed as soon as the pairs were there."""
    run = RunDirectory(str(storage), "shorter")
    job = start(package, "align", recipe)
    while job.poll() is None and not run.stage(1, "pairs").is_finished:
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert not run.storage.exists("finished.json")
    before = run.storage.read("rounds/1/pairs/stage.json")
    command(package, "align", recipe)
    assert run.storage.read("rounds/1/pairs/stage.json") == before
    return run


def test_its_code_runs_only_where_the_recipe_allows_it(package: Path, recipe: Path) -> None:
    output = command(package, "align", "--dry-run", recipe, "plugins=[]", code=2)
    assert "plugins: [shorter]" in output
    assert "Traceback" not in output


def test_it_is_planned(package: Path, recipe: Path) -> None:
    """In each of two languages at most one pair for each of 24 questions."""
    plan = json.loads(command(package, "plan", recipe, "--json"))
    pairs = plan["round"]["steps"]["pairs"]
    assert (pairs["rows"], pairs["unit"]) == (48, "pairs")
    assert plan["round"]["steps"]["train"]["rows"] == 48


def test_a_round_trains_on_its_pairs(resumed: RunDirectory) -> None:
    rows = rows_of(resumed.stage(1, "pairs").read())
    assert rows
    assert all(len(row["rejected_token_ids"]) - len(row["chosen_token_ids"]) >= 2 for row in rows)
    assert resumed.summary["rounds"][1]["pairs"] == len(rows)
    policy = resumed.policy(1)
    assert policy.name != "base"
    assert {row["policy"] for row in rows_of(resumed.stage(1, "evaluate").read())} == {policy.name}


def test_its_source_stands_in_the_run_and_must_not_change(package: Path, recipe: Path, resumed: RunDirectory) -> None:
    (name, known), *others = resumed.storage.read_json("config.json")["config"]["plugins"].items()
    assert (name, others) == ("shorter", [])
    assert len(known["sha256"]) == 64
    source = package.read_text()
    package.write_text(source.replace("chosen=own[0], rejected=own[-1]", "chosen=own[-1], rejected=own[0]"))
    try:
        output = command(package, "align", recipe, code=2)
    finally:
        package.write_text(source)
    assert "plugins.shorter.sha256" in output
    assert "--redo" in output
    assert "it is finished" in command(package, "align", recipe)


def test_a_changed_setting_of_its_own_invalidates_its_step(package: Path, recipe: Path, resumed: RunDirectory) -> None:
    output = command(package, "align", recipe, "short.difference=3", code=2)
    assert "short.difference: 2 in the run, 3 in the recipe" in output
    assert "--redo" in output


def test_show_prints_a_pair_where_its_code_may_run(package: Path, resumed: RunDirectory) -> None:
    assert "--plugins shorter" in command(package, "show", resumed.uri, code=2)
    output = command(package, "show", resumed.uri, "--plugins", "shorter")
    assert "chosen" in output
    assert "rejected" in output
