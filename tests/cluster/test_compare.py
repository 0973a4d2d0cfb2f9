"""Compares several methods from one recipe through `jobs/compare.py`, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_ray.comparison.main import main
from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
METHODS = ["base", "sft", "calm", "dpo_gold→dco"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def arguments(make_recipe: Callable[..., Path], storage: Path) -> list[str]:
    recipe = make_recipe(
        name="t1",
        storage=str(storage),
        candidates={"form": "letters"},
        train={"workers": 1},
        compare={"dpo_gold": {"train": {"learning_rate": 1e-3, "epochs": 1}}},
    )
    return [str(recipe), "--methods", *METHODS]


@pytest.fixture(scope="module")
def output(arguments: list[str]) -> str:
    """Output of the first call."""
    command = [sys.executable, str(ROOT / "jobs" / "compare.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def table_of(output: str) -> list[str]:
    lines = output.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("t1: ")) :]


def test_every_method_has_a_row_and_a_run(output: str, storage: Path) -> None:
    rows = json.loads((storage / "t1-compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", "sft", "calm", "dpo_gold->dco", "pi* of dpo_gold->dco"]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("rankc_en", "rankc_mean", "accuracy_en"))
    assert [row["pairs"] > 0 for row in rows[:-1]] == [False, True, True, True]
    words = [line.split() for line in table_of(output)]
    assert [next(line for line in words if line[:1] == [row["method"].split()[0]]) for row in rows]
    for name in ("sft", "calm", "dpo_gold", "dpo_gold-dco"):
        run = RunDirectory(str(storage), f"t1-{name}")
        assert run.storage.read_json("finished.json") == {"engine_starts": 1, "engines": 1}


def test_shared_work_is_done_once(output: str, storage: Path) -> None:
    sft, calm, dpo, chain = (
        RunDirectory(str(storage), f"t1-{name}") for name in ("sft", "calm", "dpo_gold", "dpo_gold-dco")
    )
    expected = {
        calm.stage(1, "sample"): sft.stage(1, "sample"),
        **{run.questions("align"): sft.questions("align") for run in (calm, dpo, chain)},
        **{run.stage(0, part): sft.stage(0, part) for run in (calm, dpo) for part in ("evaluate", "score")},
        **{chain.stage(0, part): dpo.stage(1, part) for part in ("evaluate", "score")},
    }
    assert {stage: stage.record.get("copied_from") for stage in expected} == {
        stage: original.storage.uri() for stage, original in expected.items()
    }
    originals = [stage for stage in set(expected.values()) if stage not in expected]
    assert all("copied_from" not in stage.record for stage in originals)
    assert not dpo.stage(1, "sample").storage.names()  # does not train on samples
    assert output.count(" node(s), ") == 1  # one cluster, so one pool of engines


def test_dco_starts_from_the_last_policy_of_dpo(output: str, storage: Path) -> None:
    dpo, chain = RunDirectory(str(storage), "t1-dpo_gold"), RunDirectory(str(storage), "t1-dpo_gold-dco")
    start = chain.start
    assert start is not None
    assert start.sha256 == dpo.stage(1, "train").record["policy"]["sha256"]
    for stage in (chain.stage(0, "evaluate"), chain.stage(0, "score"), chain.stage(1, "pairs")):
        assert {row["policy"] for row in rows_of(stage.read())} == {start.name}
    assert not chain.stage(1, "reference_score").is_finished  # copied scores serve as the reference
    first, last = dpo.summary["rounds"][-1], chain.summary["rounds"][0]
    assert [first[key] for key in ("rankc", "accuracy")] == [last[key] for key in ("rankc", "accuracy")]


def test_same_command_reuses_finished_runs(
    output: str, arguments: list[str], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [file for file in storage.rglob("*") if file.is_file() and file.name != "t1-compare.json"]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert table_of(again) == table_of(output)
    assert "already finished" in again
    assert "node(s)" not in again
    assert "engine" not in again
    assert before == {file: file.stat().st_mtime_ns for file in files}
    assert main([*arguments, "seed=7"]) == 2
    assert "seed: 0 in the run, 7 in the recipe" in capsys.readouterr().err


def test_corrupt_file_in_a_finished_run_is_repaired(
    output: str, arguments: list[str], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = RunDirectory(str(storage), "t1-calm").stage(1, "pairs")
    corrupt = Path(pairs.storage.path(f"{min(pairs.chunks())}.parquet"))
    content, rows = corrupt.read_bytes(), rows_of(pairs.read())
    others = [file for file in storage.rglob("train/**/*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in others}
    corrupt.write_bytes(content[:100])
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert f"rounds/1/pairs: 1 missing or corrupt file(s) ({corrupt.name})" in again
    # Only the seconds may differ.
    assert [line.split()[:6] for line in table_of(again)] == [line.split()[:6] for line in table_of(output)]
    assert rows_of(pairs.read()) == rows
    assert before == {file: file.stat().st_mtime_ns for file in others}  # no retraining
