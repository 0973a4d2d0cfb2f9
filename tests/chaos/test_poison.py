"""Prompts that crash every engine, and engines that hang."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import policy_of_each_completion, sample_all
from poison import NAME, poison_file
from small_runs import LANGUAGES
from transformers import AutoTokenizer

from calm_ray.cli import main
from calm_ray.core.rows import Question, rows_of
from calm_ray.core.sections import Engines
from calm_ray.engines.pool import EnginePool
from calm_ray.engines.spec import EngineSpec
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.questions.reader import write_chunks
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import RunModel

pytestmark = pytest.mark.chaos


@pytest.fixture
def poison(cache: Path, babbler: Path) -> Iterator[Callable[..., None]]:
    """Makes questions poisonous for all engines started afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(babbler)

    def write(*questions: Question, how: str, once: Path | None = None) -> None:
        poisons = [
            {"start": encode_prompt(tokenizer, prompt_text(one, "choices")), "how": how, "once": once and str(once)}
            for one in questions
        ]
        poison_file().write_text(json.dumps(poisons))

    yield write
    poison_file().unlink(missing_ok=True)


def read_lines(file: Path) -> list[Question]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_with_poison(make_recipe: Callable[..., Path], storage: Path, name: str) -> tuple[RunDirectory, int]:
    """Runs a recipe whose engines load the logits processor; returns the run and the exit code."""
    args = {"logits_processors": [NAME], "max_num_seqs": 64, "max_num_batched_tokens": 256}
    # Small chunks, because engines crash until the bad prompt of a chunk is found.
    recipe = make_recipe(name=name, storage=str(storage), engines={"args": args}, sampling={"prompts_per_chunk": 2})
    return RunDirectory(str(storage), name), main(["align", str(recipe)])


def test_prompts_that_crash_every_engine_are_skipped(
    ray_8_cpus: None, poison: Callable[..., None], question_files: tuple[Path, Path],
    make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked, held_out = (read_lines(file) for file in question_files)
    bad = [asked[5], held_out[0]]
    poison(*bad, how="crash")
    run, code = run_with_poison(make_recipe, tmp_path, "poisoned")
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


@pytest.mark.parametrize(
    ("how", "timeouts", "message"),
    [
        ("sleep", {"heartbeat_timeout_s": 10}, "no heartbeat for"),
        ("sleep", {"chunk_timeout_s": 30}, "timed out after 30 s"),
        ("stop", {"heartbeat_timeout_s": 10}, "no heartbeat for"),
    ],
    ids=["no progress", "chunk timeout", "stopped process"],
)
def test_hung_engine_is_restarted(
    ray_8_cpus: None, poison: Callable[..., None], babbler: Path, question_files: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], how: str, timeouts: dict[str, Any], message: str,
) -> None:  # fmt: skip
    asked = read_lines(question_files[0])
    poison(asked[0], how=how, once=tmp_path / "once")
    run = RunDirectory(str(tmp_path), "hung")
    write_chunks(asked, run.questions("align"), prompts_per_chunk=8)
    args = {"logits_processors": [NAME], "max_model_len": 128, "max_num_seqs": 16}
    settings = Engines(shared=1, cpus=0.5, args=args, **timeouts)
    with EnginePool(EngineSpec(RunModel(str(babbler)), settings, None, "cpu", seed=0), LANGUAGES, print) as pool:
        for _ in sample_all(pool, run, run.stage(1, "sample")):
            pass
        assert pool.starts == 2
    assert (tmp_path / "once").exists()
    assert message in capsys.readouterr().out
    assert len(policy_of_each_completion(run.stage(1, "sample"))) == 3 * len(asked)
