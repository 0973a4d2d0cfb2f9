"""Training in Ray Train: the same loop on every worker, progress and metrics back to the driver."""

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

RESIZE_SECONDS = 60.0
"""How often it is looked whether there are places for more workers, or for fewer.

Then all begin anew from the last checkpoint, so elastic training writes one twice as often.
"""

Line = tuple[int | None, dict[str, Any]]
"""A row of metrics and its number, which is the same in every attempt; None for what only happened."""


class MetricsQueue:
    """Carries metrics from the first worker to the driver while training runs."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def put(self, line: Line) -> None:
        self._lines.append(line)

    def take(self) -> list[Line]:
        lines, self._lines = self._lines, []
        return lines


class Losses(UserCallback):
    """Tells of lost workers, and ends training at once where trying again would be in vain: at errors of our own."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, CalmRayError):
                raise error
        why = str(next(iter(worker_exceptions.values()))).strip().splitlines()
        self._queue.put.remote((None, {"lost": sorted(worker_exceptions), "why": why[0] if why else "no reason given"}))


def train_round(
    job: TrainJob, device: str, report: Callable[[dict[str, Any]], None], gpus_per_worker: float = 1.0
) -> Policy:
    """Trains one round on `train.workers` Ray Train workers; `report` is called on the driver with every metrics row.

    Each row is reported once, however often workers are lost; in between come rows of what happened: `lost` (workers),
    `noticed` and `resumed` (steps). Goes on from the checkpoints of an earlier attempt, and deletes them at the end.

    Workers may be lost `train.max_failures` times without a new checkpoint in between.

    Raises CalmRayError with the worker's own error where training fails, InputError where it is elastic and the
    cluster does not say where.
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
                name="ray_train",  # an empty marker file is all that Ray Train keeps there
                storage_path=job.output.storage.path(),
                storage_filesystem=job.output.storage.filesystem,
                failure_config=FailureConfig(max_failures=job.train.max_failures, max_preemption_failures=-1),
                callbacks=[Losses(queue)],
            ),
        )
        with _interruptible():
            trainer.fit()

    _fit(lambda: fit_while_it_gets_on(fit, job.output.storage), queue, report, _wanted(scaling))
    policy = Policy(**job.output.storage.read_json("policy.json"))
    checkpoint.delete_all(job.output.storage)
    return policy


def _scaling(train: Train, device: str, gpus_per_worker: float) -> ScalingConfig:
    """How many workers, and what each takes.

    Ray counts the places of elastic workers by what nodes have in all, taken by engines or not: only a resource of
    training's own tells how many there are.
    """
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": gpus_per_worker} if device == "gpu" else {})
    most = ray_state.get_max_resources_from_cluster_config() or {}
    if TRAIN_SLOT in ray.cluster_resources() or most.get(TRAIN_SLOT):
        resources[TRAIN_SLOT] = 1.0
    elif train.is_elastic:
        raise InputError(
            "train.workers: [least, most] needs a cluster that says where workers may come and go: start each node "
            f"that is to train with `ray start --resources '{{\"{TRAIN_SLOT}\": 8}}'`, the number of workers it has "
            "room for; or give train.workers one number"
        )
    return ScalingConfig(
        num_workers=train.workers,
        use_gpu=device == "gpu",
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def fit_while_it_gets_on(fit: Callable[[], None], storage: Storage) -> None:
    """Fits again where lost workers ended it, as long as there is a new checkpoint: Ray Train counts losses only up.

    Raises what `fit` raises: TrainingFailedError where it came no further, or where an error of our own ended it.
    """
    while True:
        before = checkpoint.newest_step(storage)
        try:
            fit()
            return
        except TrainingFailedError as error:
            step = checkpoint.newest_step(storage)
            if step in (before, None) or _own_error(error) is not None:
                raise
        say(f"  too many workers were lost, but training came to step {step} in between: it begins again from there")


def _own_error(error: TrainingFailedError) -> CalmRayError | None:
    """The error of our own that ended training, as `Losses` raised it."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return failure if isinstance(failure, CalmRayError) else None


def _fit(fit: Callable[[], None], queue: Any, report: Callable[[dict[str, Any]], None], wanted: str) -> None:
    done = threading.Event()
    reporter = threading.Thread(target=_report_until, args=(done, queue, report, wanted), daemon=True)
    reporter.start()
    try:
        fit()
    except (TrainingFailedError, RayError) as error:
        own = _own_error(error) if isinstance(error, TrainingFailedError) else None
        if own is not None:
            raise own from None
        raise CalmRayError(f"training failed: {error}") from error
    finally:
        done.set()
        reporter.join()
        ray.kill(queue)


def _wanted(scaling: ScalingConfig) -> str:
    """What the workers need, for a person who waits for it."""
    count = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0]
    each = ", ".join(f"{amount:g} {name}" for name, amount in (scaling.resources_per_worker or {}).items() if amount)
    return f"{count} needed, each with {each}"


def _report_until(done: threading.Event, queue: Any, report: Callable[[dict[str, Any]], None], wanted: str) -> None:
    """Passes metrics on, once a second and once more at the end; says so where training has to wait to begin."""
    told, event = 0, None
    is_waiting, heard = True, time.monotonic()
    is_last = False
    while not is_last:
        is_last = done.wait(timeout=1.0)
        for number, row in _taken(queue):
            heard = time.monotonic()
            if number is None:
                is_waiting = "resumed" not in row
                if row != event:
                    event = row
                    say(_describe(row))
                    report(row)
                continue
            # Workers that begin anew tell everything from the first line on.
            is_waiting = is_waiting and number > 0
            if number >= told:
                told = number + 1
                report(row)
        if is_waiting and time.monotonic() - heard > WAIT_SECONDS:
            heard = time.monotonic()
            say(f"waiting for the training workers to begin: {wanted}; {free_resources()}{_free_places()}")


def _taken(queue: Any) -> list[Line]:
    """The lines that have come; none while the queue itself is being started anew, which harms nothing but progress."""
    try:
        return ray.get(queue.take.remote())
    except RayError:
        return []


def _describe(row: dict[str, Any]) -> str:
    """An event for a person."""
    if "resumed" in row:
        return f"  training goes on from step {row['resumed']}"
    if "noticed" in row:
        return f"  a machine will be taken away: training has a checkpoint of step {row['noticed']}"
    return f"  training lost worker {', '.join(map(str, row['lost']))}: {row['why']}"


def _free_places() -> str:
    places = ray.cluster_resources().get(TRAIN_SLOT)
    return f", {ray.available_resources().get(TRAIN_SLOT, 0):g} of {places:g} {TRAIN_SLOT}" if places else ""


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
    """What each worker runs. Raises CalmRayError where the same would happen again, anything else where it may not."""
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
    # By the recipe, not by what is there: Ray shows all GPUs to workers that have none.
    if config["device"] == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    numbers = itertools.count()

    def report(row: dict[str, Any]) -> None:
        is_event = "resumed" in row or "noticed" in row
        queue.put.remote((None if is_event else next(numbers), row))

    if job.train.engine == "trl":
        from calm_ray.training.trl_engine import train_with_trl

        policy = train_with_trl(job, device, report)
    else:
        policy = train_policy(job, device, report, _notices)
    if context.get_world_rank() == 0:
        job.output.storage.write_json("policy.json", policy.as_json())


def _notices() -> Set[str]:
    """The nodes that are being drained, as Ray Train knows them; the same on all workers."""
    import ray.train

    info = ray.train.get_preemption_info()
    return frozenset(info.preempted_node_ids) if info is not None else frozenset()
