"""Helpers for fault injection: start runs, wait for a moment to strike, kill processes, inspect what runs wrote."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from small_runs import LANGUAGES

from calm_ray.core.rows import rows_of
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.generator import Decoding
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Sample
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.directory import RunDirectory
from calm_ray.run.stage import Stage

ROOT = Path(__file__).parents[2]


def start_run(recipe: Path, *overrides: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "calm.py"), str(recipe), *overrides]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(job: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for the condition. Fails with the job's output if the job exits first."""
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)


def progress(run: RunDirectory, stage: str) -> int:
    """Number of chunks written by a stage such as "1/sample", or of checkpoints if it is training."""
    number, name = stage.split("/")
    watched = run.stage(int(number), name)
    return len(watched.storage.names("checkpoints")) if name == "train" else len(watched.chunks())


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)


def policy_of_each_completion(stage: Stage) -> dict[tuple[str, str, int], str]:
    """Policy by (question_id, language, sample). Fails if a completion was written twice."""
    rows = rows_of(stage.read())
    policies = {(row["question_id"], row["language"], row["sample"]): row["policy"] for row in rows}
    assert len(policies) == len(rows)
    return policies


def logged_steps(metrics: Iterable[Mapping[str, Any]]) -> list[int]:
    return [row["step"] for row in metrics if "train/loss" in row]


def start_head() -> Cluster:
    """A cluster of one node, with room for the driver but not for engines or workers."""
    return Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})


def sample_all(pool: EnginePool, run: RunDirectory, output: Stage) -> Iterator[ChunkTask]:
    """Samples three completions of every question to align on; yields the finished chunks."""
    questions = run.questions("align")
    tasks = [
        ChunkTask(questions, output, chunk, code, pool.policy)
        for chunk in sorted(questions.chunks())
        for code in LANGUAGES
    ]
    decoding = Decoding(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=40)
    work = Dispatcher(tasks, max_bad=0)
    for task, _ in pool.run(Sample(decoding, seed=0, round_number=1, prompt="choices"), work):
        yield task
    assert work.bad == []
