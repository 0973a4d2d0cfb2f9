"""The driver is killed in every stage of a run, and the same command goes on; nothing of it stays behind."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_runs import MOMENTS

from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
STAGES = ["0/evaluate", "1/sample", "1/pairs", "1/train", "1/evaluate"]


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(recipe: Path, *overrides: str) -> str:
    job = start(recipe, *overrides)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    return output


def family(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


def left_over(processes: list[psutil.Process], seconds: float = 60) -> list[str]:
    """Those that are still there after a while; zombies are nobody's."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [str(one) for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def shared_memory() -> set[str]:
    return {file.name for file in Path("/dev/shm").iterdir()}


def files_of(run: RunDirectory) -> dict[str, tuple[int, bytes]]:
    """The chunks that are entered in a manifest: when each was written, and what."""
    found = {}
    for name, stage in run.all_stages().items():
        for chunk in stage.chunks():
            file = Path(run.storage.path(f"{name}/{chunk}.parquet"))
            found[f"{name}/{chunk}"] = (file.stat().st_mtime_ns, file.read_bytes())
    return found


def ids_of(run: RunDirectory) -> set[tuple[str, str, int, str]]:
    rows = rows_of(run.stage(1, "sample").read())
    ids = [(row["question_id"], row["language"], row["sample"], row["policy"]) for row in rows]
    assert len(ids) == len(set(ids))
    return set(ids)


def without_seconds(summary: Any) -> Any:
    if isinstance(summary, dict):
        return {key: without_seconds(value) for key, value in summary.items() if key != "seconds"}
    return [without_seconds(value) for value in summary] if isinstance(summary, list) else summary


def wait_for(run: RunDirectory, stage: str, chunks: int, job: subprocess.Popen[str]) -> None:
    """Until a stage holds so many chunks, or training so many checkpoints."""
    number, name = stage.split("/")
    watched = run.stage(int(number), name)
    while job.poll() is None:
        there = len(watched.storage.names("checkpoints")) if name == "train" else len(watched.chunks())
        if there >= chunks or watched.is_finished:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Path], storage: Path) -> Path:
    return make_recipe(storage=str(storage), name="undisturbed", train={"checkpoint_steps": 2})


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, storage: Path) -> RunDirectory:
    """A run that nothing happens to; and nothing of it is left when it has ended."""
    before = shared_memory()
    job = start(recipe)
    processes = []
    while job.poll() is None:
        processes += [one for one in family(job) if one not in processes]
        time.sleep(0.5)
    assert job.returncode == 0, job.communicate()[0]
    assert left_over(processes) == []
    assert shared_memory() <= before
    return RunDirectory(str(storage), "undisturbed")


@pytest.mark.chaos
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_driver_that_is_killed_in_every_stage(
    undisturbed: RunDirectory, recipe: Path, storage: Path, moment: int
) -> None:
    """One run, killed in each of its stages in turn, and gone on with at once each time."""
    rng = random.Random(moment)
    name = f"killed-{moment}"
    run, killed = RunDirectory(str(storage), name), []
    for stage in STAGES:
        job = start(recipe, f"name={name}")
        wait_for(run, stage, rng.randint(1, 3) if stage != "1/train" else 1, job)
        killed += family(job)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        there = files_of(run)
        assert there, stage
        print(f"killed in {stage} with {len(there)} chunks")
    output = finish(recipe, f"name={name}")
    after = files_of(run)
    assert {chunk: after[chunk] for chunk in there} == there, output
    assert after.keys() == files_of(undisturbed).keys()
    assert ids_of(run) == ids_of(undisturbed)
    assert without_seconds(run.summary) == without_seconds(undisturbed.summary)
    assert not run.stage(1, "train").storage.exists("checkpoints")
    assert left_over(killed, 300) == []  # Ray's own agents look only now and then whether their node still lives


@pytest.mark.chaos
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_behind_and_goes_on(
    undisturbed: RunDirectory, recipe: Path, storage: Path, end: signal.Signals
) -> None:
    before, name = shared_memory(), f"interrupted-{end.name}"
    run = RunDirectory(str(storage), name)
    job = start(recipe, f"name={name}")
    wait_for(run, "1/sample", 1, job)
    processes = family(job)
    job.send_signal(end)
    output, _ = job.communicate()
    assert job.returncode == 130, output
    assert "the same command goes on" in output
    assert left_over(processes) == []
    assert shared_memory() <= before
    assert not (storage / f".{name}.lock").exists()
    there = files_of(run)
    finish(recipe, f"name={name}")
    after = files_of(run)
    assert {chunk: after[chunk] for chunk in there} == there
    assert ids_of(run) == ids_of(undisturbed)


def test_a_damaged_run_makes_again_what_is_damaged(undisturbed: RunDirectory, recipe: Path, storage: Path) -> None:
    """A torn chunk of each kind, a gone one, a truncated manifest and half an adapter, all at once."""
    kept = files_of(undisturbed)
    folder = Path(undisturbed.storage.path())
    summary = undisturbed.summary
    torn = ["rounds/0/evaluate/00000-en", "rounds/1/sample/00001-fr", "rounds/1/votes/00002"]
    for chunk in torn:
        file = folder / f"{chunk}.parquet"
        file.write_bytes(file.read_bytes()[:-9])
    gone = folder / "rounds/1/evaluate/00001-en.parquet"
    gone.unlink()
    manifest = folder / "questions/align/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    adapter = folder / "rounds/1/train/policy/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:200])
    output = finish(recipe)
    for damaged in ("rounds/0/evaluate", "rounds/1/sample", "rounds/1/votes", "rounds/1/evaluate", "rounds/1/train"):
        assert f"{damaged}: 1 files are gone or not what was written" in output
    after = files_of(undisturbed)
    made_again = {chunk for chunk in kept if after[chunk][0] != kept[chunk][0]}
    assert made_again == {*torn, "rounds/1/pairs/00002", "rounds/1/evaluate/00001-en"}
    assert without_seconds(undisturbed.summary) == without_seconds(summary)
