"""Kills the driver in every stage of a run: the same command resumes it, and no processes stay behind."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import policy_of_each_completion, progress, start_run, wait_until
from small_runs import MOMENTS

from calm_ray.run.directory import RunDirectory

STAGES = ["0/evaluate", "1/sample", "1/pairs", "1/train", "1/evaluate"]


def complete_run(recipe: Path, *overrides: str) -> str:
    """Runs the recipe to the end; returns the output."""
    job = start_run(recipe, *overrides)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    return output


def process_tree(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


def survivors(processes: list[psutil.Process], timeout: float = 60) -> list[str]:
    """The processes still alive after `timeout` seconds, not counting zombies."""
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    return [str(one) for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def shared_memory() -> set[str]:
    return {file.name for file in Path("/dev/shm").iterdir()}


def orphaned_shared_memory() -> set[str]:
    """Files in shared memory that no process has mapped, which leaves out those of tests that run meanwhile."""
    mapped = ""
    for process in psutil.process_iter():
        with suppress(OSError):
            mapped += Path(f"/proc/{process.pid}/maps").read_text()
    return {name for name in shared_memory() if f"/dev/shm/{name}" not in mapped}


def chunk_files(run: RunDirectory) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every chunk that is in a manifest."""
    found = {}
    for name, stage in run.all_stages().items():
        for chunk in stage.chunks():
            file = Path(run.storage.path(f"{name}/{chunk}.parquet"))
            found[f"{name}/{chunk}"] = (file.stat().st_mtime_ns, file.read_bytes())
    return found


def sampled(run: RunDirectory) -> dict[tuple[str, str, int], str]:
    return policy_of_each_completion(run.stage(1, "sample"))


def without_seconds(summary: Any) -> Any:
    if isinstance(summary, dict):
        return {
            key: without_seconds(value) for key, value in summary.items() if key not in ("seconds", "refresh_seconds")
        }
    return [without_seconds(value) for value in summary] if isinstance(summary, list) else summary


def wait_for_progress(job: subprocess.Popen[str], run: RunDirectory, stage: str, count: int) -> None:
    """Waits until the stage has `count` chunks or checkpoints, or is finished."""
    number, name = stage.split("/")
    wait_until(job, lambda: progress(run, stage) >= count or run.stage(int(number), name).is_finished)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Path], storage: Path) -> Path:
    return make_recipe(storage=str(storage), name="undisturbed", train={"checkpoint_steps": 2})


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, storage: Path) -> RunDirectory:
    """A run without faults. Checks that it leaves no processes or shared memory behind."""
    before = orphaned_shared_memory()
    job = start_run(recipe)
    processes = []
    while job.poll() is None:
        processes += [one for one in process_tree(job) if one not in processes]
        time.sleep(0.5)
    assert job.returncode == 0, job.communicate()[0]
    assert survivors(processes) == []
    assert orphaned_shared_memory() <= before
    return RunDirectory(str(storage), "undisturbed")


@pytest.mark.chaos
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_run_survives_a_killed_driver_in_every_stage(
    undisturbed: RunDirectory, recipe: Path, storage: Path, moment: int
) -> None:
    """Kills one run in each stage in turn and resumes it immediately each time."""
    rng = random.Random(moment)
    name = f"killed-{moment}"
    run, killed = RunDirectory(str(storage), name), []
    for stage in STAGES:
        job = start_run(recipe, f"name={name}")
        wait_for_progress(job, run, stage, rng.randint(1, 3) if stage != "1/train" else 1)
        killed += process_tree(job)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        before = chunk_files(run)
        assert before, stage
        print(f"killed in {stage} with {len(before)} chunks")
    output = complete_run(recipe, f"name={name}")
    after = chunk_files(run)
    assert {chunk: after[chunk] for chunk in before} == before, output
    assert after.keys() == chunk_files(undisturbed).keys()
    assert sampled(run) == sampled(undisturbed)
    assert without_seconds(run.summary) == without_seconds(undisturbed.summary)
    assert not run.stage(1, "train").storage.exists("checkpoints")
    assert survivors(killed, timeout=300) == []  # Ray's agents only check now and then whether their node is alive


@pytest.mark.chaos
def test_interrupted_run_leaves_nothing_behind_and_resumes(
    undisturbed: RunDirectory, recipe: Path, storage: Path
) -> None:
    """With SIGTERM; tests/cluster/test_job.py sends SIGINT."""
    before, name = orphaned_shared_memory(), "interrupted"
    run = RunDirectory(str(storage), name)
    job = start_run(recipe, f"name={name}")
    wait_for_progress(job, run, "1/sample", 1)
    processes = process_tree(job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate()
    assert job.returncode == 130, output
    assert "rerun the same command to resume" in output
    assert survivors(processes) == []
    assert orphaned_shared_memory() <= before
    assert not (storage / f".{name}.lock").exists()
    chunks = chunk_files(run)
    complete_run(recipe, f"name={name}")
    after = chunk_files(run)
    assert {chunk: after[chunk] for chunk in chunks} == chunks
    assert sampled(run) == sampled(undisturbed)


@pytest.mark.slow
def test_only_damaged_files_are_regenerated(undisturbed: RunDirectory, recipe: Path, storage: Path) -> None:
    """Truncates a chunk of each kind, a manifest and an adapter, and deletes a chunk, all at once."""
    before = chunk_files(undisturbed)
    folder = Path(undisturbed.storage.path())
    summary = undisturbed.summary
    truncated = ["rounds/0/evaluate/00000-en", "rounds/1/sample/00001-fr", "rounds/1/votes/00002"]
    for chunk in truncated:
        file = folder / f"{chunk}.parquet"
        file.write_bytes(file.read_bytes()[:-9])
    (folder / "rounds/1/evaluate/00001-en.parquet").unlink()
    manifest = folder / "questions/align/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    adapter = folder / "rounds/1/train/policy/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:200])
    output = complete_run(recipe)
    for damaged in ("rounds/0/evaluate", "rounds/1/sample", "rounds/1/votes", "rounds/1/evaluate", "rounds/1/train"):
        assert f"{damaged}: 1 missing or corrupt file(s)" in output
    after = chunk_files(undisturbed)
    regenerated = {chunk for chunk in before if after[chunk][0] != before[chunk][0]}
    assert regenerated == {*truncated, "rounds/1/pairs/00002", "rounds/1/evaluate/00001-en"}
    assert without_seconds(undisturbed.summary) == without_seconds(summary)
