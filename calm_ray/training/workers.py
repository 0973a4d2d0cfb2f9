"""Runs training in Ray Train: the same loop on every worker, with progress and metrics sent to the driver."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer

from calm_ray.cluster.connection import WAIT_SECONDS, free_resources, on_this_node
from calm_ray.cluster.resources import TRAIN_SLOT
from calm_ray.core.console import say
from calm_ray.core.errors import CalmRayError, InputError
from calm_ray.core.sections import Train
from calm_ray.run.policies import Policy
from calm_ray.run.storage import Storage
from calm_ray.training import checkpoint
from calm_ray.training.job import TrainJob
from calm_ray.training.reports import LOST, STARTED, Report, Row, describe, is_event

RESIZE_SECONDS = 60.0
"""How often Ray Train checks whether to add or remove workers.

A resize restarts all of them from the last checkpoint, so elastic training writes one twice as often.
"""

Line = tuple[int | None, Row]
"""A row and its number: for metrics the same in every attempt, for events None."""


class MetricsQueue:
    """Carries metrics and events to the driver while training runs."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def put(self, line: Line) -> None:
        self._lines.append(line)

    def take(self) -> list[Line]:
        lines, self._lines = self._lines, []
        return lines


class WorkerFailures(UserCallback):
    """Reports lost workers, and fails fast on CalmRayError, which a retry would not fix."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, CalmRayError):
                raise error
        why = str(next(iter(worker_exceptions.values()))).strip().splitlines()
        self._queue.put.remote((None, {LOST: sorted(worker_exceptions), "why": why[0] if why else "no reason given"}))


def train_round(job: TrainJob, device: str, report: Report, gpus_per_worker: float = 1.0) -> Policy:
    """Trains one round on `train.workers` Ray Train workers; calls `report` on the driver with every row of metrics.

    Each row is reported once, no matter how often workers are lost, interleaved with events (`training.reports`).
    Resumes from the checkpoints of an earlier attempt, and deletes them at the end.

    Tolerates `train.max_failures` losses of workers without a new checkpoint in between.

    Raises CalmRayError with the worker's own error if training fails, InputError if it is elastic and the cluster has
    no training slots.
    """
    scaling = _scaling(job.train, device, gpus_per_worker)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": on_this_node()}
    queue = ray.remote(MetricsQueue).options(**options).remote()
    if job.train.is_elastic:
        job = replace(job, checkpoint_seconds=RESIZE_SECONDS / 2)

    def fit() -> None:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job, "queue": queue, "device": device},
            scaling_config=scaling,
            run_config=RunConfig(
                name="ray_train",  # Ray Train only keeps an empty marker file there
                storage_path=job.output.storage.path(),
                storage_filesystem=job.output.storage.filesystem,
                failure_config=FailureConfig(max_failures=job.train.max_failures, max_preemption_failures=-1),
                callbacks=[WorkerFailures(queue)],
            ),
        )
        with _interruptible():
            trainer.fit()

    _fit(lambda: fit_with_retries(fit, job.output.storage), queue, report, _demand(scaling))
    policy = Policy(**job.output.storage.read_json("policy.json"))
    checkpoint.delete_all(job.output.storage)
    return policy


def _scaling(train: Train, device: str, gpus_per_worker: float) -> ScalingConfig:
    """Number of workers, and the resources of each.

    Ray sizes elastic training by the nodes' total resources, even those taken by engines, so only a resource reserved
    for training tells how many workers fit.
    """
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": gpus_per_worker} if device == "gpu" else {})
    most = ray_state.get_max_resources_from_cluster_config() or {}
    if TRAIN_SLOT in ray.cluster_resources() or most.get(TRAIN_SLOT):
        resources[TRAIN_SLOT] = 1.0
    elif train.is_elastic:
        raise InputError(
            "train.workers: [min, max] needs nodes with training slots: start each training node with "
            f"`ray start --resources '{{\"{TRAIN_SLOT}\": 8}}'`, where 8 is the number of workers that fit on it, or "
            "set train.workers to one number"
        )
    return ScalingConfig(
        num_workers=train.workers,
        use_gpu=device == "gpu",
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def fit_with_retries(fit: Callable[[], None], storage: Storage) -> None:
    """Retries after lost workers while attempts write new checkpoints, since Ray Train never resets its failure count.

    Raises the TrainingFailedError of `fit` if it made no progress or a CalmRayError caused it.
    """
    while True:
        before = checkpoint.newest_step(storage)
        try:
            fit()
            return
        except TrainingFailedError as error:
            step = checkpoint.newest_step(storage)
            if step in (before, None) or _calm_ray_error(error) is not None:
                raise
        say(f"  too many workers were lost, but training reached step {step}; restarting from there")


def _calm_ray_error(error: TrainingFailedError) -> CalmRayError | None:
    """The CalmRayError that stopped training, as raised by `WorkerFailures`."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return failure if isinstance(failure, CalmRayError) else None


def _fit(fit: Callable[[], None], queue: Any, report: Report, demand: str) -> None:
    done = threading.Event()
    reporter = threading.Thread(target=_report_until, args=(done, queue, report, demand), daemon=True)
    reporter.start()
    try:
        fit()
    except (TrainingFailedError, RayError) as error:
        own = _calm_ray_error(error) if isinstance(error, TrainingFailedError) else None
        if own is not None:
            raise own from None
        raise CalmRayError(f"training failed: {error}") from error
    finally:
        done.set()
        reporter.join()
        ray.kill(queue)


def _demand(scaling: ScalingConfig) -> str:
    """The resources the workers need, for the log line while waiting."""
    count = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0]
    each = ", ".join(f"{amount:g} {name}" for name, amount in (scaling.resources_per_worker or {}).items() if amount)
    return f"{count} needed, each with {each}"


def _report_until(done: threading.Event, queue: Any, report: Report, demand: str) -> None:
    """Passes rows on every second and once more at the end; logs when training is waiting for workers."""
    next_number, event = 0, None
    is_waiting, last_sign = True, time.monotonic()
    is_last = False
    while not is_last:
        is_last = done.wait(timeout=1.0)
        for number, row in _take(queue):
            last_sign = time.monotonic()
            is_waiting = LOST in row
            if number is None:
                if row != event:
                    event = row
                    if line := describe(row):
                        say(line)
                    report(row)
            elif number >= next_number:  # restarted workers report every row from the first
                next_number = number + 1
                report(row)
        if is_waiting and time.monotonic() - last_sign > WAIT_SECONDS:
            last_sign = time.monotonic()
            say(f"waiting for training workers to start: {demand}; {free_resources()}{_free_slots()}")


def _take(queue: Any) -> list[Line]:
    """New lines; none while the queue actor restarts, which only affects progress output."""
    try:
        return ray.get(queue.take.remote())
    except RayError:
        return []


def _free_slots() -> str:
    slots = ray.cluster_resources().get(TRAIN_SLOT)
    return f", {ray.available_resources().get(TRAIN_SLOT, 0):g} of {slots:g} {TRAIN_SLOT}" if slots else ""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Keeps Ctrl-C a KeyboardInterrupt: Ray Train's own handler exits with 0 and stays installed afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker. Raises CalmRayError if a retry would fail the same way, anything else if it might not."""
    import ray.train

    try:
        _train(config)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError):
        rank = ray.train.get_context().get_world_rank()
        raise CalmRayError(f"training failed on worker {rank}:\n{traceback.format_exc()}") from None


def _train(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    from calm_ray.training.loop import train_policy

    job, queue = config["job"], config["queue"]
    context = ray.train.get_context()
    # Not torch.cuda.is_available(): Ray exposes all GPUs to workers that requested none.
    if config["device"] == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    numbers = itertools.count()

    def report(row: Row) -> None:
        queue.put.remote((None if is_event(row) else next(numbers), row))

    if context.get_world_rank() == 0:
        report({STARTED: context.get_world_size()})
    if job.train.engine == "trl":
        from calm_ray.training.trl_engine import train_with_trl

        policy = train_with_trl(job, device, report)
    else:
        policy = train_policy(job, device, report, _preempted_nodes)
    if context.get_world_rank() == 0:
        job.output.storage.write_json("policy.json", policy.as_json())


def _preempted_nodes() -> Set[str]:
    """The nodes being drained, as seen by Ray Train; the same on all workers."""
    import ray.train

    info = ray.train.get_preemption_info()
    return frozenset(info.preempted_node_ids) if info is not None else frozenset()
