"""Training in Ray Train workers: FSDP2 across processes, TRL as the second engine, memory use while loading."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import ray.train
import torch
from factories import pairs_stage, tiny_model
from peft import PeftModel
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import AutoModelForCausalLM

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import rows_of
from calm_ray.core.sections import Lora, Train
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training import workers
from calm_ray.training.job import TrainJob
from calm_ray.training.objectives import DPO, SFT, Objective
from calm_ray.training.workers import train_round

pytestmark = pytest.mark.usefixtures("ray_8_cpus")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return pairs_stage(tmp_path_factory.mktemp("pairs"))


def train(
    model: Path,
    pairs: Stage,
    output: Path,
    start: Policy | None = None,
    objective: Objective | None = None,
    **changes: Any,
) -> tuple[Policy, list[dict[str, Any]]]:  # fmt: skip
    """Trains one round; returns its policy and the metrics reported to the driver."""
    metrics: list[dict[str, Any]] = []
    return train_round(train_job(model, pairs, output, start, objective, **changes), "cpu", metrics.append), metrics


def train_job(
    model: Path,
    pairs: Stage,
    output: Path,
    start: Policy | None = None,
    objective: Objective | None = None,
    **changes: Any,
) -> TrainJob:  # fmt: skip
    settings = {
        "learning_rate": 1e-2, "warmup_ratio": 0.1, "epochs": 2, "batch_pairs": 8, "dtype": "float32",
        "cpus_per_worker": 0.5, "validation_fraction": 0.1, "pack_tokens": 200, **changes,
    }  # fmt: skip
    stage = Stage(Storage(str(output)))
    return TrainJob(
        pairs,
        stage,
        RunModel(str(model)),
        start or Policy(),
        Policy(),
        Train(**settings),
        objective or DPO(0.1),
        0,
        1 if start is None else 2,
    )


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in metrics if "train/loss" in row]


@pytest.mark.slow
def test_number_of_workers_does_not_change_the_losses(model: Path, pairs: Stage, tmp_path: Path) -> None:
    one, one_metrics = train(model, pairs, tmp_path / "one", workers=1)
    two, two_metrics = train(model, pairs, tmp_path / "two", workers=2)
    copies, copies_metrics = train(model, pairs, tmp_path / "copies", workers=2, shards=1)
    first, second, third = losses(one_metrics), losses(two_metrics), losses(copies_metrics)
    assert first[0] == pytest.approx(0.6931472, abs=1e-4)
    assert first[-1] < 0.68
    print(f"1 and 2 workers differ by {max(abs(a - b) for a, b in zip(first, second, strict=True)):.1e}")
    assert second == pytest.approx(first, abs=1e-4)
    assert third == pytest.approx(first, abs=1e-4)
    validation = [[row["validation/loss"] for row in m if "validation/loss" in row] for m in (one_metrics, two_metrics)]
    assert len(validation[0]) == 2
    assert validation[1] == pytest.approx(validation[0], abs=1e-4)
    for policy in (one, two, copies):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(policy.local_folder()))
    margins = rows_of(Storage(str(tmp_path / "two")).read_table("reference.parquet"))
    assert len(margins) == 48
    assert {row["reference"] for row in margins} == {"base"}


@pytest.mark.slow
def test_second_round_starts_from_the_first_policy(model: Path, pairs: Stage, tmp_path: Path) -> None:
    first, metrics = train(model, pairs, tmp_path / "first", workers=2)
    _, again = train(model, pairs, tmp_path / "second", start=first, workers=2, epochs=1)
    assert first.kind == "adapter"
    # Starts where the first round ended. The reference is still the base model, so the loss is far below ln 2.
    assert losses(again)[0] == pytest.approx(losses(metrics)[-1], abs=0.1)
    assert losses(again)[0] < 0.6


@pytest.mark.slow
def test_full_fine_tuning_and_sft(model: Path, pairs: Stage, tmp_path: Path) -> None:
    policy, metrics = train(model, pairs, tmp_path / "full", workers=2, lora=None, learning_rate=1e-3)
    assert policy.kind == "weights"
    assert losses(metrics)[0] == pytest.approx(0.6931472, abs=1e-4)
    AutoModelForCausalLM.from_pretrained(policy.local_folder())
    _, sft = train(model, pairs, tmp_path / "sft", objective=SFT(), workers=2)
    assert losses(sft)[-1] < losses(sft)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"]])
def test_trl_computes_the_expected_losses(model: Path, pairs: Stage, tmp_path: Path, loss_type: list[str]) -> None:
    changes: dict[str, Any] = {"workers": 2, "validation_fraction": 0.0, "epochs": 1}
    policy, metrics = train(model, pairs, tmp_path / "trl", engine="trl", trl={"loss_type": loss_type}, **changes)
    first = losses(metrics)[0]
    if loss_type == ["sigmoid"]:
        _, ours = train(model, pairs, tmp_path / "ours", **changes)
        assert first == pytest.approx(losses(ours)[0], abs=1e-4)
        assert fmean(losses(metrics)) == pytest.approx(fmean(losses(ours)), abs=0.05)
    else:
        assert first == pytest.approx(1 / (2 * 0.1) ** 2, rel=1e-4)  # (0 - 1 / (2 beta))^2 at the first step
    files = {file.name for file in policy.local_folder().iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not any(name.endswith(".bin") for name in files)


@pytest.mark.slow
def test_waiting_is_logged_only_until_workers_run(
    model: Path, pairs: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One log of lines and rows, in order. Reports are taken once a second, so nearly every time is a wait."""
    log: list[Any] = []
    monkeypatch.setattr(workers, "say", log.append)
    monkeypatch.setattr(workers, "WAIT_SECONDS", 0.1)
    job = train_job(model, pairs, tmp_path / "run", workers=2)
    train_round(job, "cpu", log.append)
    started = log.index({"started": 2})
    assert any("waiting for training workers to start: 2 needed" in line for line in log[:started])
    assert all(isinstance(row, dict) for row in log[started:])
    rows = log[started:]
    assert [row["reference"] for row in rows if "reference" in row][-1] == 48
    assert len(losses(rows)) > 0


@pytest.mark.slow
def test_worker_error_reaches_the_driver(model: Path, pairs: Stage, tmp_path: Path) -> None:
    with pytest.raises(CalmRayError, match="not_a_module"):
        train(model, pairs, tmp_path / "bad", lora=Lora(targets=["not_a_module"]))


def peak_memory_growth(model: Path, workers: int, results: Path) -> list[float]:
    """Peak growth of each worker's private memory while it loads the model, in MB."""

    def measure() -> None:
        import threading

        import psutil

        from calm_ray.training.model import PolicyModel

        process, peak, done = psutil.Process(), [0], threading.Event()

        def private_memory() -> int:
            memory = process.memory_info()
            return memory.rss - memory.shared  # without mapped files

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], private_memory())

        settings = Train(learning_rate=1e-3, warmup_ratio=0.0, dtype="float32")
        before = private_memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        policy = PolicyModel(model, settings, torch.device("cpu"))
        policy.load(Policy(), 0)
        done.set()
        watcher.join()
        rank = ray.train.get_context().get_world_rank()
        (results / f"{rank}").write_text(str((peak[0] - before) / 2**20))

    scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5})
    TorchTrainer(measure, scaling_config=scaling).fit()
    return [float((results / f"{rank}").read_text()) for rank in range(workers)]


@pytest.mark.slow
def test_no_worker_loads_the_whole_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "large", word_tokenizer(["w"]), width=1024, layers=12, key_value_heads=32)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    assert size > 300
    peaks = peak_memory_growth(folder, 2, tmp_path)
    print(f"model {size:.0f} MB, peaks {peaks} MB")
    # Half of the model each, plus what loading needs.
    assert max(peaks) < 0.75 * size
