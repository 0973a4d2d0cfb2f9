"""Assigning chunks to engines, and finding the prompts that crash every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from factories import question

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Question, table
from calm_ray.engines.dispatcher import Dispatcher, skip_bad_prompts
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def make_tasks(folder: Path, chunks: int, questions: int, languages: tuple[str, ...] = ("en",)) -> list[ChunkTask]:
    """Writes chunks of questions q0, q1, ... in each language, and returns their tasks."""
    stage, output = (Stage(Storage(str(folder / name))) for name in ("questions", "output"))
    for number in range(chunks):
        rows = [question(f"q{number * questions + i}", code) for i in range(questions) for code in languages]
        stage.write(f"{number:05d}", table(Question, rows))
    return [ChunkTask(stage, output, f"{number:05d}", code) for number in range(chunks) for code in languages]


def serve_all(
    dispatcher: Dispatcher, poison: set[str], crash_rate: float = 0.0, seed: int = 0
) -> tuple[list[str], int]:
    """Serves every chunk on an engine that crashes on `poison` and sometimes at random; (served questions, deaths)."""
    rng, served, deaths = random.Random(seed), [], 0
    while not dispatcher.is_done:
        task = dispatcher.next(None)
        assert task is not None
        ids = [row["question_id"] for row in task.read()]
        if poison & set(ids) or rng.random() < crash_rate:
            deaths += 1
            dispatcher.died(task, "it died")
        elif dispatcher.finished(task):
            served += ids
    return served, deaths


@pytest.mark.parametrize("poison", [{"q0"}, {"q7"}, {"q3", "q4"}, {"q9", "q20", "q31"}, set()])
def test_bad_prompts_are_found_and_others_served_once(tmp_path: Path, poison: set[str]) -> None:
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=4, questions=8), max_bad=3)
    served, _ = serve_all(dispatcher, poison)
    assert sorted(served) == sorted({f"q{i}" for i in range(32)} - poison)
    assert {one.question_id for one in dispatcher.bad} == poison


@pytest.mark.parametrize("seed", range(20))
def test_random_crashes_blame_no_prompt(tmp_path: Path, seed: int) -> None:
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=6, questions=8), max_bad=0)
    served, deaths = serve_all(dispatcher, set(), crash_rate=0.1, seed=seed)
    assert sorted(served) == sorted(f"q{i}" for i in range(48))
    assert dispatcher.bad == []
    assert deaths <= 48


def test_finding_a_bad_prompt_crashes_few_engines(tmp_path: Path) -> None:
    """At most two crashes on the whole chunk, one per bisection step, and one more on the prompt alone."""
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=64), max_bad=1)
    assert serve_all(dispatcher, {"q0"})[1] <= 2 + 6 + 1


def test_one_crash_on_a_single_prompt_is_not_enough_to_blame_it(tmp_path: Path) -> None:
    """Engines crash for no reason until a single prompt is on trial, and never again."""
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=8), max_bad=0)
    while (task := dispatcher.next(None)) is not None:
        dispatcher.died(task, "an accident")
        if task.only is not None and len(task.only) == 1:
            break
    assert serve_all(dispatcher, set()) == ([f"q{i}" for i in range(8)], 0)
    assert dispatcher.bad == []


@pytest.mark.parametrize("poison", [range(3), range(10), [0, 1, 62, 20]])
def test_adjacent_bad_prompts_are_all_found(tmp_path: Path, poison: Sequence[int]) -> None:
    """However many precede the first good one: a prompt from the other end of the chunk clears the engines."""
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=64), max_bad=10)
    served, _ = serve_all(dispatcher, {f"q{i}" for i in poison})
    assert {one.question_id for one in dispatcher.bad} == {f"q{i}" for i in poison}
    assert len(served) == 64 - len(poison)


def test_too_many_bad_prompts_stop_the_run(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=4, questions=8), max_bad=2)
    with pytest.raises(CalmRayError, match=r"3 prompts crash every engine, .* engines.max_bad_prompts \(2\)"):
        serve_all(dispatcher, {"q1", "q9", "q17"})
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=8), max_bad=2, known_bad=2)
    with pytest.raises(CalmRayError, match="3 prompts"):
        serve_all(dispatcher, {"q1"})


def test_engines_that_crash_on_every_prompt_are_blamed(tmp_path: Path) -> None:
    noted: list[int] = []
    dispatcher = Dispatcher(
        make_tasks(tmp_path, chunks=4, questions=8), max_bad=100, on_bad=lambda bad: noted.append(len(bad))
    )
    with pytest.raises(CalmRayError, match="engines crash on every prompt: 4 bad prompts in a row"):
        serve_all(dispatcher, {f"q{i}" for i in range(32)})
    assert noted == [1, 2, 3, 4, 0]  # no prompt is to blame


def serve_until_too_large(dispatcher: Dispatcher, size: int) -> None:
    """Serves every chunk on an engine that crashes on `size` questions at once, but on none alone."""
    while (task := dispatcher.next(None)) is not None:
        if len(task.read()) == size:
            dispatcher.died(task, "out of memory")
        else:
            dispatcher.finished(task)


def test_chunk_that_crashes_only_as_a_whole_is_reported(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=8), max_bad=2)
    with pytest.raises(CalmRayError, match=r"output/00000-en.*crashes every engine although no single prompt does"):
        serve_until_too_large(dispatcher, size=8)


def test_home_language_comes_before_the_longest_queue(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, chunks=2, questions=1, languages=("en", "fr", "zh"))
    dispatcher = Dispatcher(
        [*tasks, *make_tasks(tmp_path / "more", chunks=3, questions=1, languages=("zh",))], max_bad=0
    )
    taken = [dispatcher.next(home) for home in ("fr", "fr", "fr", None)]
    assert [task.language for task in taken if task] == ["fr", "fr", "zh", "zh"]
    assert taken[0] is not None
    dispatcher.died(taken[0], "lost with its node")
    assert dispatcher.next("en") == taken[0]  # requeued chunks come first, on any engine


def test_known_bad_prompts_are_skipped_in_their_language(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, chunks=1, questions=3, languages=("en", "fr"))
    en, fr = skip_bad_prompts(tasks, {("q1", "fr")})
    assert [row["question_id"] for row in en.read()] == ["q0", "q1", "q2"]
    assert [row["question_id"] for row in fr.read()] == ["q0", "q2"]
    assert [row["question_id"] for row in fr.skipped()] == ["q1"]


def test_requeued_chunks_blame_no_prompt(tmp_path: Path) -> None:
    """However many idle engines were lost with their node before the chunk reached one."""
    dispatcher = Dispatcher(make_tasks(tmp_path, chunks=1, questions=3), max_bad=0)
    for _ in range(10):
        task = dispatcher.next(None)
        assert task is not None
        assert task.only is None
        dispatcher.requeue(task)
    assert serve_all(dispatcher, set()) == (["q0", "q1", "q2"], 0)
