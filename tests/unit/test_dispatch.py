"""Who gets which chunk, and how a prompt is found that ends every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from factories import question

from calm_ray.core.errors import CalmRayError
from calm_ray.core.rows import Question, table
from calm_ray.engines.dispatcher import Dispatcher, without_bad
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def tasks_of(folder: Path, chunks: int, questions: int, languages: tuple[str, ...] = ("en",)) -> list[ChunkTask]:
    """Chunks of questions named q0, q1 ... in each language."""
    stage, output = (Stage(Storage(str(folder / name))) for name in ("questions", "output"))
    for number in range(chunks):
        rows = [question(f"q{number * questions + i}", code) for i in range(questions) for code in languages]
        stage.write(f"{number:05d}", table(Question, rows))
    return [ChunkTask(stage, output, f"{number:05d}", code) for number in range(chunks) for code in languages]


def work_off(work: Dispatcher, poison: set[str], accident: float = 0.0, seed: int = 0) -> tuple[list[str], int]:
    """Does everything on one engine that dies of `poison`, and now and then for no reason; (questions done, deaths)."""
    rng, done, deaths = random.Random(seed), [], 0
    while not work.is_done:
        task = work.next(None)
        assert task is not None
        ids = [row["question_id"] for row in task.read()]
        if poison & set(ids) or rng.random() < accident:
            deaths += 1
            work.died(task, "it died")
        elif work.finished(task):
            done += ids
    return done, deaths


@pytest.mark.parametrize("poison", [{"q0"}, {"q7"}, {"q3", "q4"}, {"q9", "q20", "q31"}, set()])
def test_bad_prompts_are_found_and_all_others_done_once(tmp_path: Path, poison: set[str]) -> None:
    work = Dispatcher(tasks_of(tmp_path, chunks=4, questions=8), most_bad=3)
    done, _ = work_off(work, poison)
    assert sorted(done) == sorted({f"q{i}" for i in range(32)} - poison)
    assert {one.question_id for one in work.bad} == poison


@pytest.mark.parametrize("seed", range(20))
def test_accidents_blame_nobody(tmp_path: Path, seed: int) -> None:
    work = Dispatcher(tasks_of(tmp_path, chunks=6, questions=8), most_bad=0)
    done, deaths = work_off(work, set(), accident=0.1, seed=seed)
    assert sorted(done) == sorted(f"q{i}" for i in range(48))
    assert work.bad == []
    assert deaths <= 48


def test_a_bad_prompt_costs_few_engines(tmp_path: Path) -> None:
    """Two under the whole chunk, at most one for each halving, one more under the prompt by itself."""
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=64), most_bad=1)
    assert work_off(work, {"q0"})[1] <= 2 + 6 + 1


def test_one_accident_under_a_prompt_by_itself_does_not_blame_it(tmp_path: Path) -> None:
    """Engines die of nothing in particular until a single prompt is tried, and never again."""
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=8), most_bad=0)
    while (task := work.next(None)) is not None:
        work.died(task, "an accident")
        if task.only is not None and len(task.only) == 1:
            break
    assert work_off(work, set()) == ([f"q{i}" for i in range(8)], 0)
    assert work.bad == []


@pytest.mark.parametrize("poison", [range(3), range(10), [0, 1, 62, 20]])
def test_bad_prompts_side_by_side_are_all_found(tmp_path: Path, poison: Sequence[int]) -> None:
    """However many there are before the first good one: that the engines are well shows at the chunk's other end."""
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=64), most_bad=10)
    done, _ = work_off(work, {f"q{i}" for i in poison})
    assert {one.question_id for one in work.bad} == {f"q{i}" for i in poison}
    assert len(done) == 64 - len(poison)


def test_too_many_bad_prompts_stop_the_run(tmp_path: Path) -> None:
    work = Dispatcher(tasks_of(tmp_path, chunks=4, questions=8), most_bad=2)
    with pytest.raises(CalmRayError, match=r"3 prompts end every engine .* engines.max_bad_prompts \(2\)"):
        work_off(work, {"q1", "q9", "q17"})
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=8), most_bad=2, bad_before=2)
    with pytest.raises(CalmRayError, match="3 prompts"):
        work_off(work, {"q1"})


def test_engines_that_die_of_everything_are_blamed_themselves(tmp_path: Path) -> None:
    noted: list[int] = []
    work = Dispatcher(
        tasks_of(tmp_path, chunks=4, questions=8), most_bad=100, on_bad=lambda bad: noted.append(len(bad))
    )
    with pytest.raises(CalmRayError, match="engines end whatever they are given: 4 prompts in a row"):
        work_off(work, {f"q{i}" for i in range(32)})
    assert noted == [1, 2, 3, 4, 0]  # no prompt is to blame


def try_all(work: Dispatcher, most: int) -> None:
    """On an engine that dies of `most` questions together, and of none by itself."""
    while (task := work.next(None)) is not None:
        if len(task.read()) == most:
            work.died(task, "out of memory")
        else:
            work.finished(task)


def test_a_chunk_that_is_too_much_as_a_whole_is_named(tmp_path: Path) -> None:
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=8), most_bad=2)
    with pytest.raises(CalmRayError, match=r"output/00000-en.*though none of its prompts does by itself"):
        try_all(work, most=8)


def test_an_engine_takes_its_own_language_first_then_of_the_one_with_most(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, chunks=2, questions=1, languages=("en", "fr", "zh"))
    work = Dispatcher([*tasks, *tasks_of(tmp_path / "more", chunks=3, questions=1, languages=("zh",))], most_bad=0)
    taken = [work.next(home) for home in ("fr", "fr", "fr", None)]
    assert [task.language for task in taken if task] == ["fr", "fr", "zh", "zh"]
    assert taken[0] is not None
    work.died(taken[0], "lost with its node")
    assert work.next("en") == taken[0]  # what comes back is done first, by whoever is free


def test_known_bad_prompts_are_left_out_in_their_language(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, chunks=1, questions=3, languages=("en", "fr"))
    en, fr = without_bad(tasks, {("q1", "fr")})
    assert [row["question_id"] for row in en.read()] == ["q0", "q1", "q2"]
    assert [row["question_id"] for row in fr.read()] == ["q0", "q2"]
    assert [row["question_id"] for row in fr.skipped()] == ["q1"]


def test_an_engine_that_was_dead_already_blames_nobody(tmp_path: Path) -> None:
    """However many idle engines were lost with their machine before the last chunk was given to one."""
    work = Dispatcher(tasks_of(tmp_path, chunks=1, questions=3), most_bad=0)
    for _ in range(10):
        task = work.next(None)
        assert task is not None
        assert task.only is None
        work.requeue(task)
    assert work_off(work, set()) == (["q0", "q1", "q2"], 0)
