"""Engines are killed while they sample and while they do not: nothing is lost or there twice, no policy is stale.

One pool of three engines goes through all of it, so that what an accident leaves behind would show in the next one.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from factories import read_questions
from small_runs import LANGUAGES, MOMENTS, make_adapter

from calm_ray.core.rows import rows_of
from calm_ray.core.sections import Engines, Lora
from calm_ray.engines.dispatcher import Dispatcher
from calm_ray.engines.generator import Decoding
from calm_ray.engines.health import Health
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.requests import Sample
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.questions.reader import write_chunks
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage

ENGINES = 3
LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, question_files: tuple[Path, Path]) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("storage")), "chaos")
    write_chunks(read_questions(str(question_files[0]), LANGUAGES), run.questions("align"), prompts_per_chunk=4)
    return run


@pytest.fixture(scope="module")
def policy(babbler: Path, run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """An adapter: an engine that is started again has the base model at first."""
    return make_adapter(babbler, tmp_path_factory.mktemp("adapter") / "1", run, 1, LORA)


LONG = pytest.mark.chaos


@pytest.fixture(scope="module", params=["actor", pytest.param("child", marks=LONG)])
def pool(request: pytest.FixtureRequest, ray_8_cpus: None, babbler: Path, policy: Policy) -> Iterator[EnginePool]:
    settings = Engines(
        shared=ENGINES, cpus=0.5, min_engines=ENGINES, process=request.param, max_restarts=20,
        args={"max_model_len": 128, "max_num_seqs": 16},
    )  # fmt: skip
    spec = EngineSpec(RunModel(str(babbler)), settings, LORA, "cpu", seed=0)
    with EnginePool(spec, LANGUAGES, print) as pool:
        pool.refresh(policy)
        yield pool


@pytest.fixture(scope="module")
def undisturbed(pool: EnginePool, run: RunDirectory) -> set[tuple[str, str, int]]:
    output = Stage(run.storage.under("undisturbed"))
    for _ in sampling(pool, run, output):
        pass
    return set(ids_of(output))


def sampling(pool: EnginePool, run: RunDirectory, output: Stage) -> Iterator[ChunkTask]:
    questions = run.questions("align")
    tasks = [
        ChunkTask(questions, output, chunk, code, pool.policy)
        for chunk in sorted(questions.chunks())
        for code in LANGUAGES
    ]
    decoding = Decoding(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=40)
    work = Dispatcher(tasks, most_bad=0)
    for task, _ in pool.run(Sample(decoding, seed=0, round_number=1, instruction=False), work):
        yield task
    assert work.bad == []


def ids_of(output: Stage) -> list[tuple[str, str, int]]:
    return [(row["question_id"], row["language"], row["sample"]) for row in rows_of(output.read())]


def engine_processes(pool: EnginePool) -> list[psutil.Process]:
    """The processes that compute: the actors, or vLLM's core that is their child."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::EngineActor"):
            found.append(process)
    actors = found or [p for p in psutil.process_iter() if "EngineActor" in " ".join(p.cmdline()[:1])]
    if pool.spec.engines.process == "actor":
        return actors
    return [max(actor.children(), key=lambda child: child.memory_info().rss) for actor in actors]


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize(
    ("when", "victims"),
    [
        ("sampling", 1),
        pytest.param("idle", 1, marks=LONG),
        pytest.param("sampling", ENGINES - 1, marks=LONG),
        pytest.param("idle", ENGINES - 1, marks=LONG),
    ],
)
def test_a_killed_engine_loses_nothing(
    pool: EnginePool, run: RunDirectory, undisturbed: set[tuple[str, str, int]], policy: Policy, when: str,
    victims: int, moment: int,
) -> None:  # fmt: skip
    rng = random.Random(f"{when} {victims} {moment}")
    output = Stage(run.storage.under(f"{pool.spec.engines.process}/{when}-{victims}-{moment}"))
    before = pool.starts
    processes = engine_processes(pool)
    assert len(processes) == ENGINES
    chosen = rng.sample(processes, victims)
    at = rng.randrange(1, 5)
    if when == "idle":
        kill(chosen)
    for number, _ in enumerate(sampling(pool, run, output), start=1):
        if when == "sampling" and number == at:
            kill(chosen)
    rows = rows_of(output.read())
    assert {row["policy"] for row in rows} == {policy.name}
    assert len(rows) == len(ids_of(output)) == len(set(ids_of(output)))
    assert set(ids_of(output)) == undisturbed
    assert output.flawed() == []
    pool.wait_for_all()
    assert pool.states() == {Health.HEALTHY: ENGINES}
    assert pool.starts == before + victims


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
