"""Kills engines while they sample and while they are idle: no row is lost, duplicated or from a stale policy.

All tests share one pool of three engines, so that leftovers of one fault would show in the next test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from factories import read_questions
from faults import kill, policy_of_each_completion, sample_all
from small_runs import LANGUAGES, MOMENTS, make_adapter

from calm_ray.core.sections import Engines, Lora
from calm_ray.engines.health import Health
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.spec import EngineSpec
from calm_ray.questions.reader import write_chunks
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage

pytestmark = pytest.mark.chaos
ENGINES = 3
LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, question_files: tuple[Path, Path]) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("storage")), "chaos")
    write_chunks(read_questions(str(question_files[0]), LANGUAGES), run.questions("align"), prompts_per_chunk=4)
    return run


@pytest.fixture(scope="module")
def policy(babbler: Path, run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """An adapter, because a restarted engine has the base model until it loads the policy."""
    return make_adapter(babbler, tmp_path_factory.mktemp("adapter") / "1", run, 1, LORA)


@pytest.fixture(scope="module")
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
    """The completions that are sampled without faults."""
    output = Stage(run.storage.under("undisturbed"))
    for _ in sample_all(pool, run, output):
        pass
    return set(policy_of_each_completion(output))


def engine_processes(pool: EnginePool) -> list[psutil.Process]:
    """The processes that run the model: the actors, or vLLM's core in a child of each."""
    own = psutil.Process().children(recursive=True)
    actors = [process for process in own if process.name().startswith("ray::EngineActor")]
    if pool.spec.engines.process == "actor":
        return actors
    return [max(actor.children(), key=lambda child: child.memory_info().rss) for actor in actors]


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize(
    ("pool", "when", "victims"),
    [
        ("actor", "sampling", 1),
        ("actor", "idle", 1),
        ("actor", "sampling", ENGINES - 1),
        ("actor", "idle", ENGINES - 1),
        ("child", "sampling", ENGINES - 1),
    ],
    indirect=["pool"],
)
def test_killed_engines_lose_no_completions(
    pool: EnginePool, run: RunDirectory, undisturbed: set[tuple[str, str, int]], policy: Policy, when: str,
    victims: int, moment: int,
) -> None:  # fmt: skip
    rng = random.Random(f"{when} {victims} {moment}")
    output = Stage(run.storage.under(f"{pool.spec.engines.process}/{when}-{victims}-{moment}"))
    before = pool.starts
    processes = engine_processes(pool)
    assert len(processes) == ENGINES
    chosen = rng.sample(processes, victims)
    kill_after = rng.randrange(1, 5)  # finished chunks
    if when == "idle":
        kill(chosen)
    for number, _ in enumerate(sample_all(pool, run, output), start=1):
        if when == "sampling" and number == kill_after:
            kill(chosen)
    completions = policy_of_each_completion(output)
    assert set(completions.values()) == {policy.name}
    assert set(completions) == undisturbed
    assert output.flawed() == []
    pool.wait_for_all()
    assert pool.states() == {Health.HEALTHY: ENGINES}
    assert pool.starts == before + victims
