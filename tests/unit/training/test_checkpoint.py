"""Resuming training from a checkpoint as if it had never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from factories import tiny_model, token_pair
from pyarrow import fs

from calm_ray.core.rows import Pair, table
from calm_ray.core.sections import Lora, Train
from calm_ray.methods.dco.objective import DCO
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training import checkpoint, checkpoint_triggers
from calm_ray.training.job import TrainJob
from calm_ray.training.loop import Trainer, train_policy
from calm_ray.training.objectives import DPO, SFT, Objective
from calm_ray.training.reports import Row, is_event

CPU = torch.device("cpu")
LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj"])
OBJECTIVES = [(objective, lora) for objective in (DPO(0.1), DCO(0.1), SFT()) for lora in (LORA, None)]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALM_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """12 pairs, each in two languages."""
    stage = Stage(Storage(str(tmp_path_factory.mktemp("pairs"))))
    rng = random.Random(0)
    rows = []
    for number in range(12):
        row = token_pair(number, rng)
        rows += [Pair(**{**row, "language": code, "target_margin": rng.gauss(0, 1)}) for code in ("en", "fr")]
    stage.write("00000", table(Pair, rows))
    return stage


def make_job(model: Path, pairs: Stage, output: Path, objective: Objective | None = None, **changes: Any) -> TrainJob:
    """12 steps: 3 in each of 4 epochs."""
    settings = {
        "learning_rate": 1e-3, "warmup_ratio": 0.2, "epochs": 4, "batch_pairs": 7, "dtype": "float32", "lora": LORA,
        "validation_fraction": 0.2, "checkpoint_steps": 2, **changes,
    }  # fmt: skip
    stage = Stage(Storage(str(output)))
    return TrainJob(
        pairs, stage, RunModel(str(model)), Policy(), Policy(), Train(**settings), objective or DPO(0.1), 0, 1
    )


@pytest.fixture(scope="module")
def uninterrupted(model: Path, pairs: Stage, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A finished job."""
    job = make_job(model, pairs, tmp_path_factory.mktemp("uninterrupted"))
    train(job)
    return job


class Stopped(Exception):
    pass


def stop_at(step: int, stop: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """A report callback that calls `stop` at a step, before that step has a checkpoint."""

    def report(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            stop()

    return report


def raise_stopped() -> None:
    raise Stopped


def train(job: TrainJob) -> tuple[Policy, list[dict[str, Any]]]:
    """Trains to the end; returns the policy and the reported rows."""
    reported: list[dict[str, Any]] = []
    return train_policy(job, CPU, reported.append), reported


def train_until(job: TrainJob, step: int) -> None:
    with pytest.raises(Stopped):
        train_policy(job, CPU, stop_at(step, raise_stopped))


def written_metrics(job: TrainJob) -> list[dict[str, Any]]:
    """The written metrics without step durations."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in job.output.storage.read_json("metrics.json")]


def metrics_of(reported: list[Row]) -> list[Row]:
    return [row for row in reported if not is_event(row)]


def saved_steps(job: TrainJob) -> list[int]:
    return [int(name) for name in job.output.storage.names("checkpoints")]


@pytest.mark.parametrize(("objective", "lora"), OBJECTIVES, ids=str)
def test_resumed_training_matches_uninterrupted_training(
    model: Path, pairs: Stage, tmp_path: Path, objective: Objective, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = make_job(model, pairs, tmp_path / "uninterrupted", objective, lora=lora)
    policy, reported = train(uninterrupted)
    assert metrics_of(reported) == uninterrupted.output.storage.read_json("metrics.json")

    job = make_job(model, pairs, tmp_path / "stopped", objective, lora=lora)
    train_until(job, 8)
    assert saved_steps(job) == [4, 6]
    monkeypatch.setattr(Trainer, "_own_logps", None)  # must be read, not recomputed
    again, reported = train(job)
    assert {"round": 1, "resumed": 6} in reported
    assert written_metrics(job) == [pytest.approx(row, abs=1e-6) for row in written_metrics(uninterrupted)]
    assert metrics_of(reported) == job.output.storage.read_json("metrics.json")
    assert again.sha256 == policy.sha256


def test_last_two_checkpoints_are_kept_as_safetensors_and_json(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = make_job(model, pairs, tmp_path)
    train(job)
    assert saved_steps(job) == [10, 12]
    files = [file for file in (tmp_path / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    manifest = json.loads((tmp_path / "checkpoints/00000012/checkpoint.json").read_text())
    assert manifest["step"] == 12
    assert manifest["workers"] == 1
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        file.name: file.stat().st_size
        for file in files
        if file.parent.name == "00000012" and file.name != "checkpoint.json"
    }
    checkpoint.delete_all(job.output.storage)
    assert not (tmp_path / "checkpoints").exists()


def shard_of(folder: Path) -> Path:
    (shard,) = folder.glob("*.safetensors")
    return shard


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


CORRUPTIONS: dict[str, Callable[[Path], Any]] = {
    "unfinished": lambda folder: (folder / "checkpoint.json").unlink(),
    "truncated checkpoint.json": lambda folder: truncate(folder / "checkpoint.json"),
    "truncated state": lambda folder: truncate(folder / "state.json"),
    "truncated shard": lambda folder: truncate(shard_of(folder)),
    "flipped bit in a shard": lambda folder: flip_bit(shard_of(folder)),
    "missing shard": lambda folder: shard_of(folder).unlink(),
    "foreign shard": lambda folder: (folder / "other.safetensors").write_bytes(shard_of(folder).read_bytes()),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupt_checkpoint_falls_back_to_the_previous_one(
    uninterrupted: TrainJob, tmp_path: Path, corruption: str
) -> None:
    job = replace(uninterrupted, output=Stage(Storage(str(tmp_path))))
    train_until(job, 8)
    CORRUPTIONS[corruption](tmp_path / "checkpoints/00000006")
    _, reported = train(job)
    assert [row["resumed"] for row in reported if "resumed" in row] == [4]
    assert written_metrics(job) == written_metrics(uninterrupted)


def test_training_without_a_valid_checkpoint_starts_over(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = make_job(model, pairs, tmp_path)
    train_until(job, 4)
    for step in saved_steps(job):
        (tmp_path / f"checkpoints/{step:08d}/checkpoint.json").unlink()
    _, reported = train(job)
    assert not any("resumed" in row for row in reported)
    assert [row["step"] for row in reported if "train/loss" in row] == list(range(1, 13))
    assert saved_steps(job) == [10, 12]


def test_checkpoints_of_different_examples_are_ignored(model: Path, pairs: Stage, tmp_path: Path) -> None:
    train_until(make_job(model, pairs, tmp_path), 8)
    _, reported = train(make_job(model, pairs, tmp_path, validation_fraction=0.0))
    assert not any("resumed" in row for row in reported)


def test_margins_of_another_reference_or_corrupt_are_recomputed(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = make_job(model, pairs, tmp_path, epochs=1)
    train(job)
    file = tmp_path / "reference.parquet"
    written, rows = file.read_bytes(), job.output.read_chunk("reference")
    foreign = rows.set_column(3, "reference", [["r0001-12345678"] * len(rows)]).cast(rows.schema)
    for corrupt in (lambda: job.output.write("reference", foreign), lambda: truncate(file)):
        corrupt()
        checkpoint.delete_all(job.output.storage)
        train(job)
        assert file.read_bytes() == written


def test_each_preemption_notice_triggers_one_checkpoint(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = make_job(model, pairs, tmp_path, checkpoint_steps=100)
    reported: list[dict[str, Any]] = []
    saved: list[list[int]] = []

    def report(row: dict[str, Any]) -> None:
        reported.append(row)
        if "noticed" in row:
            saved.append(saved_steps(job))

    def preempted() -> Set[str]:
        steps = sum("train/loss" in row for row in reported)
        return {"node a"} if steps in (2, 3) else {"node a", "node b"} if steps > 3 else set()

    train_policy(job, CPU, report, preempted)
    assert [row["noticed"] for row in reported if "noticed" in row] == [2, 4]
    assert saved == [[2], [3, 4]]  # an epoch ends with step 3


def test_timer_triggers_a_checkpoint(uninterrupted: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, latest = 0.0, {}
    monkeypatch.setattr(checkpoint_triggers, "time", SimpleNamespace(monotonic=lambda: now))
    train_settings = uninterrupted.train.model_copy(update={"checkpoint_steps": 100})
    job = replace(uninterrupted, output=Stage(Storage(str(tmp_path))), train=train_settings, checkpoint_seconds=15.0)

    def report(row: dict[str, Any]) -> None:
        nonlocal now
        if "train/loss" in row:
            latest[row["step"]] = max(saved_steps(job), default=0)
            now += 10.0

    train_policy(job, CPU, report)
    # Epochs end with steps 3, 6, 9 and 12; the timer triggers a checkpoint 20 seconds after each.
    assert list(latest.values()) == [0, 0, 2, 3, 3, 5, 6, 6, 8, 9, 9, 11]


def run_worker(rank: int, world: int, rendezvous: Path, job: TrainJob, stop: int | None, cache: str) -> None:
    """Runs one worker in its own process; exits at step `stop` as if all workers were killed.

    The checkpoint timer of rank 1 is 30 years longer.
    """
    os.environ["CALM_RAY_CACHE"] = cache
    torch.set_num_threads(1)
    job = replace(job, checkpoint_seconds=job.checkpoint_seconds + 1e9 * rank)
    store = dist.FileStore(str(rendezvous), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    train_policy(job, CPU, stop_at(stop, lambda: os._exit(0)) if stop else lambda row: None)
    dist.destroy_process_group()


def train_in_two_processes(job: TrainJob, rendezvous: Path, stop: int | None = None) -> None:
    context, cache = multiprocessing.get_context("forkserver"), os.environ["CALM_RAY_CACHE"]
    context.set_forkserver_preload(["calm_ray.training.loop"])  # imports torch once
    workers = [context.Process(target=run_worker, args=(rank, 2, rendezvous, job, stop, cache)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert workers[0].exitcode == 0


@pytest.mark.parametrize("lora", [Lora(r=1, targets=["q_proj", "v_proj"]), None], ids=["lora", "full"])
def test_training_resumes_with_another_number_of_workers(
    model: Path, pairs: Stage, tmp_path: Path, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA rank 1 a matrix has one row, so one of two workers holds none of it."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    uninterrupted = make_job(model, pairs, tmp_path / "uninterrupted", DCO(0.1), lora=lora)
    train(uninterrupted)

    fewer = make_job(model, pairs, tmp_path / "fewer", DCO(0.1), lora=lora)
    train_in_two_processes(fewer, tmp_path / "rendezvous 1", stop=6)
    manifest = json.loads((tmp_path / "fewer/checkpoints/00000004/checkpoint.json").read_text())
    assert manifest["workers"] == 2
    assert sum(name.endswith(".safetensors") for name in manifest["files"]) == 2
    _, reported = train(fewer)
    assert {"round": 1, "resumed": 4} in reported

    more = make_job(model, pairs, tmp_path / "more", DCO(0.1), lora=lora)
    train_until(more, 6)
    train_in_two_processes(more, tmp_path / "rendezvous 2")
    for job in (fewer, more):
        assert written_metrics(job) == [pytest.approx(row, abs=1e-4) for row in written_metrics(uninterrupted)]


def test_workers_checkpoint_together_despite_different_timers(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = replace(make_job(model, pairs, tmp_path / "run", checkpoint_steps=100), checkpoint_seconds=0.0)
    train_in_two_processes(job, tmp_path / "rendezvous", stop=6)
    assert saved_steps(job) == [4, 5]


def run_worker_killed_while_saving(rendezvous: Path, job: TrainJob, cache: str) -> None:
    checkpoint.save_slices = lambda *arguments, **named: os._exit(0)  # type: ignore[attr-defined]
    run_worker(0, 1, rendezvous, job, None, cache)


def test_leftovers_of_a_killed_worker_are_deleted(
    uninterrupted: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("CALM_RAY_CACHE", str(cache))
    job = replace(uninterrupted, output=Stage(Storage(str(tmp_path / "run"))))
    arguments = (tmp_path / "rendezvous", job, str(cache))
    worker = multiprocessing.get_context("forkserver").Process(target=run_worker_killed_while_saving, args=arguments)
    worker.start()
    worker.join()
    assert len(list(cache.glob("checkpoints/*"))) == 1
    (cache / "checkpoints" / "another run").mkdir()
    train(job)
    assert [file.name for file in cache.glob("checkpoints/*")] == ["another run"]


@pytest.fixture
def memory_root(monkeypatch: pytest.MonkeyPatch) -> str:
    """Root of storages in an in-memory object store."""
    files = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    on_disk = Storage.__dict__["_resolved"].func

    def resolved(storage: Storage) -> tuple[fs.FileSystem, str]:
        return (files, storage.root) if storage.root.startswith("memory://") else on_disk(storage)

    monkeypatch.setattr(Storage, "_resolved", property(resolved))
    return "memory://run"


def test_checkpoints_in_an_object_store_are_copied_only_while_read(
    uninterrupted: TrainJob, tmp_path: Path, memory_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    job = replace(uninterrupted, output=Stage(Storage(memory_root)))
    train_until(job, 8)
    _, reported = train(job)
    assert {"round": 1, "resumed": 6} in reported
    assert written_metrics(job) == written_metrics(uninterrupted)
    assert not [file for file in (tmp_path / "cache" / "checkpoints").iterdir() if file.is_dir()]


def test_partly_deleted_checkpoint_copy_is_downloaded_again(
    uninterrupted: TrainJob, tmp_path: Path, memory_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed while deleting its copy."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    job = replace(uninterrupted, output=Stage(Storage(f"{memory_root}/deleted")))
    train_until(job, 8)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "barrier", raise_stopped)  # the copy is deleted after it
        with pytest.raises(Stopped):
            train(job)
    (shard,) = (tmp_path / "cache" / "checkpoints").glob("*/*.safetensors")
    shard.unlink()
    train(job)
    assert written_metrics(job) == written_metrics(uninterrupted)
