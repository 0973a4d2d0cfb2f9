"""Ray Train workers on several GPUs, and engines with tensor parallelism in placement groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from factories import pairs_stage, question, tiny_model

from calm_ray.core.rows import rows_of
from calm_ray.core.sections import Engines, Lora, Train
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.generator import Decoding
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Sample
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.questions.reader import write_chunks
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.training.job import TrainJob
from calm_ray.training.objectives import DPO
from calm_ray.training.workers import train_round


@pytest.fixture(scope="module", autouse=True)
def all_gpus() -> Iterator[None]:
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), width=256, layers=4, key_value_heads=2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return pairs_stage(tmp_path_factory.mktemp("pairs"))


def losses(model: Path, pairs: Stage, output: Path, **changes: Any) -> list[float]:
    """The loss curve of one round of training."""
    settings = {"learning_rate": 1e-2, "warmup_ratio": 0.1, "epochs": 2, "dtype": "float32", "attention": "sdpa"}
    train = Train(**{**settings, **changes})
    job = TrainJob(pairs, Stage(Storage(str(output))), RunModel(str(model)), Policy(), Policy(), train, DPO(0.1), 0, 1)
    rows: list[dict[str, Any]] = []
    train_round(job, "gpu", rows.append)
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.gpu(2)
def test_two_gpus_give_the_same_losses_as_one(model: Path, pairs: Stage, tmp_path: Path) -> None:
    one, two = (losses(model, pairs, tmp_path / str(n), workers=n) for n in (1, 2))
    assert one[0] == pytest.approx(0.6931472, abs=1e-4)
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.gpu(4)
def test_hybrid_and_full_sharding_give_the_same_losses(model: Path, pairs: Stage, tmp_path: Path) -> None:
    full = losses(model, pairs, tmp_path / "full", workers=4)
    hybrid = losses(model, pairs, tmp_path / "hybrid", workers=4, shards=2)
    assert hybrid == pytest.approx(full, abs=1e-4)


@pytest.mark.gpu(2)
def test_trl_shards_through_accelerate(model: Path, pairs: Stage, tmp_path: Path) -> None:
    ours = losses(model, pairs, tmp_path / "ours", workers=2, validation_fraction=0)
    trl = losses(model, pairs, tmp_path / "trl", workers=2, validation_fraction=0, engine="trl")
    assert trl[0] == pytest.approx(ours[0], abs=1e-4)


def generate_greedily(model: Path, folder: Path, **engines: Any) -> list[list[int]]:
    """Token ids that an engine generates greedily for 16 questions."""
    questions = Stage(Storage(str(folder / "questions")))
    write_chunks([question(f"q{i}") for i in range(16)], questions, prompts_per_chunk=16)
    output = Stage(Storage(str(folder / "sample")))
    settings = Engines(shared=1, dtype="float32", args={"max_model_len": 256}, **engines)
    spec = EngineSpec(RunModel(str(model)), settings, Lora(), "gpu", seed=0)
    tasks = [ChunkTask(questions, output, chunk, "en") for chunk in questions.chunks()]
    work = Dispatcher(tasks, max_bad=0)
    with EnginePool(spec, ["en"], print) as pool:
        decoding = Decoding(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=16)
        list(pool.run(Sample(decoding, seed=0, round_number=1), work))
    return [row["token_ids"] for row in rows_of(output.read())]


@pytest.mark.gpu(2)
def test_two_gpu_engine_generates_the_same_tokens_as_one_gpu(model: Path, tmp_path: Path) -> None:
    one = generate_greedily(model, tmp_path / "one")
    two = generate_greedily(model, tmp_path / "two", tensor_parallel_size=2)
    same = torch.tensor([a == b for a, b in zip(one, two, strict=True)]).float().mean()
    assert same >= 0.9  # split sums differ in their last digits
