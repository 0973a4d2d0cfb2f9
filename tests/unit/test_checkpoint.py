"""Training that goes on from a checkpoint, as if it had never stopped."""

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


def job_of(model: Path, pairs: Stage, output: Path, objective: Objective | None = None, **changes: Any) -> TrainJob:
    """12 steps: 3 in each of 4 epochs."""
    settings = {
        "learning_rate": 1e-3, "warmup_share": 0.2, "epochs": 4, "batch_pairs": 7, "dtype": "float32", "lora": LORA,
        "validation_share": 0.2, "checkpoint_steps": 2, **changes,
    }  # fmt: skip
    stage = Stage(Storage(str(output)))
    return TrainJob(
        pairs, stage, RunModel(str(model)), Policy(), Policy(), Train(**settings), objective or DPO(0.1), 0, 1
    )


@pytest.fixture(scope="module")
def undisturbed(model: Path, pairs: Stage, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A finished training of the job that `job_of` gives."""
    job = job_of(model, pairs, tmp_path_factory.mktemp("undisturbed"))
    train(job)
    return job


class Stopped(Exception):
    pass


def stop_at(step: int, stop: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """A report that ends training when it is told of a step, before that step has a checkpoint."""

    def report(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            stop()

    return report


def raise_stopped() -> None:
    raise Stopped


def train(job: TrainJob) -> tuple[Policy, list[dict[str, Any]]]:
    """Trains to the end; returns the policy and what was reported."""
    told: list[dict[str, Any]] = []
    return train_policy(job, CPU, told.append), told


def train_until(job: TrainJob, step: int) -> None:
    with pytest.raises(Stopped):
        train_policy(job, CPU, stop_at(step, raise_stopped))


def lines(job: TrainJob) -> list[dict[str, Any]]:
    """The metrics that were written, without how long steps took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in job.output.storage.read_json("metrics.json")]


def steps_there(job: TrainJob) -> list[int]:
    return [int(name) for name in job.output.storage.names("checkpoints")]


@pytest.mark.parametrize(("objective", "lora"), OBJECTIVES, ids=str)
def test_what_stopped_and_went_on_is_what_never_stopped(
    model: Path, pairs: Stage, tmp_path: Path, objective: Objective, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = job_of(model, pairs, tmp_path / "undisturbed", objective, lora=lora)
    policy, told = train(undisturbed)
    assert told == undisturbed.output.storage.read_json("metrics.json")

    job = job_of(model, pairs, tmp_path / "stopped", objective, lora=lora)
    train_until(job, 8)
    assert steps_there(job) == [4, 6]
    monkeypatch.setattr(Trainer, "_own_logps", None)  # they are read, not computed again
    again, told = train(job)
    assert {"round": 1, "resumed": 6} in told
    assert lines(job) == [pytest.approx(line, abs=1e-6) for line in lines(undisturbed)]
    assert [row for row in told if "resumed" not in row] == job.output.storage.read_json("metrics.json")
    assert again.sha256 == policy.sha256


def test_checkpoints_are_safetensors_and_json_and_the_last_two_are_kept(
    model: Path, pairs: Stage, tmp_path: Path
) -> None:
    job = job_of(model, pairs, tmp_path)
    train(job)
    assert steps_there(job) == [10, 12]
    files = [file for file in (tmp_path / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    whole = json.loads((tmp_path / "checkpoints/00000012/checkpoint.json").read_text())
    assert whole["step"] == 12
    assert whole["workers"] == 1
    assert {name: entry["bytes"] for name, entry in whole["files"].items()} == {
        file.name: file.stat().st_size
        for file in files
        if file.parent.name == "00000012" and file.name != "checkpoint.json"
    }
    checkpoint.delete_all(job.output.storage)
    assert not (tmp_path / "checkpoints").exists()


def shard_of(folder: Path) -> Path:
    (shard,) = folder.glob("*.safetensors")
    return shard


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "not finished": lambda folder: (folder / "checkpoint.json").unlink(),
    "torn checkpoint.json": lambda folder: tear(folder / "checkpoint.json"),
    "torn state": lambda folder: tear(folder / "state.json"),
    "torn shard": lambda folder: tear(shard_of(folder)),
    "one bit of a shard": lambda folder: flip(shard_of(folder)),
    "lost shard": lambda folder: shard_of(folder).unlink(),
    "foreign shard": lambda folder: (folder / "other.safetensors").write_bytes(shard_of(folder).read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    undisturbed: TrainJob, tmp_path: Path, damage: str
) -> None:
    job = replace(undisturbed, output=Stage(Storage(str(tmp_path))))
    train_until(job, 8)
    DAMAGES[damage](tmp_path / "checkpoints/00000006")
    _, told = train(job)
    assert [row["resumed"] for row in told if "resumed" in row] == [4]
    assert lines(job) == lines(undisturbed)


def test_without_a_whole_checkpoint_training_starts_from_its_start(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = job_of(model, pairs, tmp_path)
    train_until(job, 4)
    for step in steps_there(job):
        (tmp_path / f"checkpoints/{step:08d}/checkpoint.json").unlink()
    _, told = train(job)
    assert not any("resumed" in row for row in told)
    assert [row["step"] for row in told if "train/loss" in row] == list(range(1, 13))
    assert steps_there(job) == [10, 12]


def test_checkpoints_of_other_examples_are_not_taken_up(model: Path, pairs: Stage, tmp_path: Path) -> None:
    train_until(job_of(model, pairs, tmp_path), 8)
    _, told = train(job_of(model, pairs, tmp_path, validation_share=0.0))
    assert not any("resumed" in row for row in told)


def test_margins_are_computed_again_where_they_are_of_another_reference_or_torn(
    model: Path, pairs: Stage, tmp_path: Path
) -> None:
    job = job_of(model, pairs, tmp_path, epochs=1)
    train(job)
    file = tmp_path / "reference.parquet"
    written, rows = file.read_bytes(), job.output.read_chunk("reference")
    others = rows.set_column(3, "reference", [["r0001-12345678"] * len(rows)]).cast(rows.schema)
    for damage in (lambda: job.output.write("reference", others), lambda: tear(file)):
        damage()
        checkpoint.delete_all(job.output.storage)
        train(job)
        assert file.read_bytes() == written


def test_each_notice_leads_to_one_checkpoint_at_once(model: Path, pairs: Stage, tmp_path: Path) -> None:
    job = job_of(model, pairs, tmp_path, checkpoint_steps=100)
    told: list[dict[str, Any]] = []
    there: list[list[int]] = []

    def report(row: dict[str, Any]) -> None:
        told.append(row)
        if "noticed" in row:
            there.append(steps_there(job))

    def preempted() -> Set[str]:
        steps = sum("train/loss" in row for row in told)
        return {"node a"} if steps in (2, 3) else {"node a", "node b"} if steps > 3 else set()

    train_policy(job, CPU, report, preempted)
    assert [row["noticed"] for row in told if "noticed" in row] == [2, 4]
    assert there == [[2], [3, 4]]  # an epoch ends with step 3


def test_when_no_checkpoint_was_written_for_so_long_there_is_one(
    undisturbed: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, there = 0.0, {}
    monkeypatch.setattr(checkpoint_triggers, "time", SimpleNamespace(monotonic=lambda: now))
    train_settings = undisturbed.train.model_copy(update={"checkpoint_steps": 100})
    job = replace(undisturbed, output=Stage(Storage(str(tmp_path))), train=train_settings, checkpoint_seconds=15.0)

    def report(row: dict[str, Any]) -> None:
        nonlocal now
        if "train/loss" in row:
            there[row["step"]] = max(steps_there(job), default=0)
            now += 10.0

    train_policy(job, CPU, report)
    # Epochs end with steps 3, 6, 9 and 12; 20 seconds after each there is a checkpoint by the clock.
    assert list(there.values()) == [0, 0, 2, 3, 3, 5, 6, 6, 8, 9, 9, 11]


def one_of(rank: int, world: int, rendezvous: Path, job: TrainJob, stop: int | None, cache: str) -> None:
    """A worker in a process of its own, where training stops as if all were killed.

    The clock of the second is 30 years behind with its checkpoints.
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
    workers = [context.Process(target=one_of, args=(rank, 2, rendezvous, job, stop, cache)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert workers[0].exitcode == 0


@pytest.mark.parametrize("lora", [Lora(r=1, targets=["q_proj", "v_proj"]), None], ids=["lora", "full"])
def test_another_number_of_workers_goes_on(
    model: Path, pairs: Stage, tmp_path: Path, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rank 1 a matrix has one row: one of two workers has nothing of it."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    undisturbed = job_of(model, pairs, tmp_path / "undisturbed", DCO(0.1), lora=lora)
    train(undisturbed)

    fewer = job_of(model, pairs, tmp_path / "fewer", DCO(0.1), lora=lora)
    train_in_two_processes(fewer, tmp_path / "rendezvous 1", stop=6)
    whole = json.loads((tmp_path / "fewer/checkpoints/00000004/checkpoint.json").read_text())
    assert whole["workers"] == 2
    assert sum(name.endswith(".safetensors") for name in whole["files"]) == 2
    _, told = train(fewer)
    assert {"round": 1, "resumed": 4} in told

    more = job_of(model, pairs, tmp_path / "more", DCO(0.1), lora=lora)
    train_until(more, 6)
    train_in_two_processes(more, tmp_path / "rendezvous 2")
    for job in (fewer, more):
        assert lines(job) == [pytest.approx(line, abs=1e-4) for line in lines(undisturbed)]


def test_workers_write_a_checkpoint_together_whatever_their_clocks_say(
    model: Path, pairs: Stage, tmp_path: Path
) -> None:
    job = replace(job_of(model, pairs, tmp_path / "run", checkpoint_steps=100), checkpoint_seconds=0.0)
    train_in_two_processes(job, tmp_path / "rendezvous", stop=6)
    assert steps_there(job) == [4, 5]


def killed_while_saving(rendezvous: Path, job: TrainJob, cache: str) -> None:
    checkpoint.save_slices = lambda *arguments, **named: os._exit(0)  # type: ignore[attr-defined]
    one_of(0, 1, rendezvous, job, None, cache)


def test_what_a_killed_worker_left_on_the_node_is_deleted_by_the_next(
    undisturbed: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("CALM_RAY_CACHE", str(cache))
    job = replace(undisturbed, output=Stage(Storage(str(tmp_path / "run"))))
    arguments = (tmp_path / "rendezvous", job, str(cache))
    worker = multiprocessing.get_context("forkserver").Process(target=killed_while_saving, args=arguments)
    worker.start()
    worker.join()
    assert len(list(cache.glob("checkpoints/*"))) == 1
    (cache / "checkpoints" / "of another run").mkdir()
    train(job)
    assert [file.name for file in cache.glob("checkpoints/*")] == ["of another run"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is no disk, for storages of this root."""
    files = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    on_disk = Storage.__dict__["_resolved"].func

    def resolved(storage: Storage) -> tuple[fs.FileSystem, str]:
        return (files, storage.root) if storage.root.startswith("memory://") else on_disk(storage)

    monkeypatch.setattr(Storage, "_resolved", property(resolved))
    return "memory://run"


def test_checkpoints_in_an_object_store_are_copied_for_as_long_as_they_are_read(
    undisturbed: TrainJob, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    job = replace(undisturbed, output=Stage(Storage(memory)))
    train_until(job, 8)
    _, told = train(job)
    assert {"round": 1, "resumed": 6} in told
    assert lines(job) == lines(undisturbed)
    assert not [file for file in (tmp_path / "cache" / "checkpoints").iterdir() if file.is_dir()]


def test_a_copy_that_was_being_deleted_is_made_again(
    undisturbed: TrainJob, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed in the middle of that."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    job = replace(undisturbed, output=Stage(Storage(f"{memory}/deleted")))
    train_until(job, 8)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "barrier", raise_stopped)  # after which the copy is deleted
        with pytest.raises(Stopped):
            train(job)
    (shard,) = (tmp_path / "cache" / "checkpoints").glob("*/*.safetensors")
    shard.unlink()
    train(job)
    assert lines(job) == lines(undisturbed)
