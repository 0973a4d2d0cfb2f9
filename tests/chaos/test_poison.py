"""Prompts that end every engine, and engines that hang, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from poison import NAME, poison_file
from small_runs import LANGUAGES
from transformers import AutoTokenizer

from calm_ray.cli import main
from calm_ray.core.rows import Question, rows_of
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.run.directory import RunDirectory

pytestmark = pytest.mark.chaos


@pytest.fixture
def poisoned(cache: Path, babbler: Path) -> Iterator[Callable[..., None]]:
    """Makes questions poison for every engine that is started from then on."""
    tokenizer = AutoTokenizer.from_pretrained(babbler)

    def poison(*questions: Question, how: str, once: Path | None = None) -> None:
        poisons = [
            {"start": encode_prompt(tokenizer, prompt_text(one, False)), "how": how, "once": once and str(once)}
            for one in questions
        ]
        poison_file().write_text(json.dumps(poisons))

    yield poison
    poison_file().unlink(missing_ok=True)


def read(file: Path) -> list[Question]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_of(make_recipe: Callable[..., Path], storage: Path, name: str, **engines: Any) -> tuple[RunDirectory, int]:
    args = {"logits_processors": [NAME], "max_num_seqs": 64, "max_num_batched_tokens": 256}
    recipe = make_recipe(name=name, storage=str(storage), engines={"args": args, **engines})
    return RunDirectory(str(storage), name), main(["align", str(recipe)])


def test_a_prompt_that_ends_every_engine_is_isolated_and_the_run_completes(
    ray_8_cpus: None, poisoned: Callable[..., None], question_files: tuple[Path, Path],
    make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked, held_out = (read(file) for file in question_files)
    bad = [asked[5], held_out[0]]
    poisoned(*bad, how="crash")
    run, code = run_of(make_recipe, tmp_path, "poisoned")
    assert code == 0
    listed = rows_of(run.storage.read_table("bad_prompts.parquet"))
    assert {(row["question_id"], row["language"], row["questions"]) for row in listed} == {
        (bad[0]["question_id"], bad[0]["language"], "questions/align"),
        (bad[1]["question_id"], bad[1]["language"], "questions/held_out"),
    }
    assert f"bad prompt: {bad[0]['question_id']} in {bad[0]['language']}" in capsys.readouterr().out
    rows = rows_of(run.stage(1, "sample").read())
    missing = (bad[0]["question_id"], bad[0]["language"])
    everything = {(row["question_id"], row["language"]) for row in asked}
    assert {(row["question_id"], row["language"]) for row in rows} == everything - {missing}
    assert len(rows) == 3 * (len(everything) - 1)
    for number in (0, 1):
        answers = {(row["question_id"], row["language"]): row for row in rows_of(run.stage(number, "evaluate").read())}
        assert len(answers) == len(held_out)
        assert answers[bad[1]["question_id"], bad[1]["language"]]["answer"] is None
    assert set(run.summary["rounds"][1]["accuracy"]) == set(LANGUAGES)


def test_more_bad_prompts_than_are_allowed_stop_the_run(
    ray_8_cpus: None, poisoned: Callable[..., None], question_files: tuple[Path, Path],
    make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    poisoned(read(question_files[1])[0], how="crash")
    _, code = run_of(make_recipe, tmp_path, "too-many", max_bad_prompts=0)
    assert code == 1
    said = capsys.readouterr().err
    assert "1 prompts end every engine they are given to, more than engines.max_bad_prompts (0)" in said


@pytest.mark.parametrize(
    ("how", "limits", "said"),
    [
        ("sleep", {"silent_seconds": 10}, "no sign of life for"),
        ("sleep", {"chunk_seconds": 30}, "not done after 30 s"),
        ("stop", {"silent_seconds": 10}, "no sign of life for"),
    ],
    ids=["no progress", "chunk deadline", "stopped process"],
)
def test_an_engine_that_hangs_is_replaced(
    ray_8_cpus: None, poisoned: Callable[..., None], question_files: tuple[Path, Path],
    make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    how: str, limits: dict[str, float], said: str,
) -> None:  # fmt: skip
    asked = read(question_files[0])
    poisoned(asked[0], how=how, once=tmp_path / "once")
    run, code = run_of(make_recipe, tmp_path, "hung", **limits)
    assert code == 0
    assert (tmp_path / "once").exists()
    assert said in capsys.readouterr().out
    assert not run.storage.exists("bad_prompts.parquet")
    rows = rows_of(run.stage(1, "sample").read())
    assert len(rows) == 3 * len(asked)
    assert run.storage.read_json("finished.json")["engine_starts"] >= 2
