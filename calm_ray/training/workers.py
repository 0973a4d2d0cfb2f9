"""Training in Ray Train: the same loop on every worker, progress and metrics back to the driver."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from calm_ray.cluster import WAIT_SECONDS, free_resources
from calm_ray.errors import CalmRayError
from calm_ray.policies import Policy
from calm_ray.progress import say
from calm_ray.training.loop import TrainJob


class MetricsQueue:
    """Carries metrics from the first worker to the driver while training runs."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def put(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows


def train_round(job: TrainJob, device: str, report: Callable[[dict[str, Any]], None]) -> Policy:
    """Trains one round on `train.workers` Ray Train workers; `report` is called on the driver with every metrics row.

    Raises CalmRayError with the worker's own error where training fails.
    """
    queue = ray.remote(num_cpus=0)(MetricsQueue).remote()
    resources = {"CPU": job.train.cpus_per_worker} | ({"GPU": 1.0} if device == "gpu" else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "queue": queue, "device": device},
        scaling_config=ScalingConfig(
            num_workers=job.train.most_workers, use_gpu=device == "gpu", resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=job.output.storage.path(),
            storage_filesystem=job.output.storage.filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    _fit(trainer, queue, report)
    return Policy(**job.output.storage.read_json("policy.json"))


def _fit(trainer: TorchTrainer, queue: Any, report: Callable[[dict[str, Any]], None]) -> None:
    done = threading.Event()
    reporter = threading.Thread(target=_report_until, args=(done, queue, report), daemon=True)
    reporter.start()
    try:
        with _interruptible():
            trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise CalmRayError(f"training failed: {error}") from error
    finally:
        done.set()
        reporter.join()
        ray.kill(queue)


def _report_until(done: threading.Event, queue: Any, report: Callable[[dict[str, Any]], None]) -> None:
    """Passes metrics on, once a second and once more at the end; says so where training has to wait to begin."""
    has_begun, said = False, time.monotonic()
    is_last = False
    while not is_last:
        is_last = done.wait(timeout=1.0)
        for row in ray.get(queue.take.remote()):
            has_begun = True
            report(row)
        if not has_begun and time.monotonic() - said > WAIT_SECONDS:
            said = time.monotonic()
            say(f"waiting for the training workers to begin; {free_resources()}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Ray Train ends the workers in its own handler, which it leaves behind, and exits with 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import ray.train
    import torch

    from calm_ray.training.loop import train_policy

    job, queue = config["job"], config["queue"]
    context = ray.train.get_context()
    # By the recipe, not by what is there: Ray shows all GPUs to workers that have none.
    if config["device"] == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    if job.train.engine == "trl":
        from calm_ray.training.trl_engine import train_with_trl

        policy = train_with_trl(job, device, lambda row: queue.put.remote(row))
    else:
        policy = train_policy(job, device, lambda row: queue.put.remote(row))
    if context.get_world_rank() == 0:
        job.output.storage.write_json("policy.json", policy.as_json())
