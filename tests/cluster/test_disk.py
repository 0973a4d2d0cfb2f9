"""`calm-ray questions | pairs | stats` on files as a user would call them, and related whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from calm_ray.cli import main
from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("ray_8_cpus")

PAIR_COLUMNS = [
    "question_id", "language", "prompt", "chosen", "rejected", "chosen_answer", "rejected_answer", "chosen_language",
]  # fmt: skip


def test_published_samples_give_the_published_pairs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = str(data / "calm_xcsqa" / "samples")
    out = tmp_path / "pairs"
    assert main(["pairs", "--completions", samples, "--preset", "released", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["pairs.parquet", "stats.json"]
    pairs = pq.read_table(out / "pairs.parquet")
    assert pairs.column_names == PAIR_COLUMNS
    stats = json.loads((out / "stats.json").read_text())
    assert stats["pairs"] == len(pairs) == 4016
    assert stats["pairs_by_language"] == {"en": 140, "cn": 913, "fr": 611, "de": 739, "it": 693, "ja": 920}
    assert stats["accuracy_by_language"]["cn"] == pytest.approx(0.5206, abs=1e-4)
    assert stats["vote_accuracy"] == pytest.approx(0.6696, abs=1e-4)
    assert (stats["consistency"], stats["ac3"]) == pytest.approx((0.5773, 0.5823), abs=1e-4)
    output = capsys.readouterr().out
    assert "chosen right 56.5, rejected right 19.2, both wrong 24.3 percent" in output
    # Existing pairs are not overwritten.
    assert main(["pairs", "--completions", samples, "--out", str(out)]) == 2
    assert "pairs.parquet already exists" in capsys.readouterr().err
    files = [str(path) for path in sorted(Path(samples).iterdir())]
    assert main(["stats", *files, "--set", "ties=smallest", "--json"]) == 0
    strict = json.loads(capsys.readouterr().out)
    assert set(strict["pairs_by_language"]) == {"en", "zh", "fr", "de", "it", "ja"}
    assert "translated" in strict


def test_skipped_rows_are_listed_next_to_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        "instruction": "?",
        "input": "Q?\nA. x\nB. y",
        "output": "A",
        "pred": ["Answer: A", "Answer: B", "Answer: A"],
    }
    (tmp_path / "mine_en.json").write_text(json.dumps([good, {**good, "pred": None}]))
    command = ["pairs", "--completions", str(tmp_path / "mine_en.json"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "mine_en.json, row 2: field 'pred' must be a non-empty list" in capsys.readouterr().err
    assert main([*command, "--on-bad-row", "skip"]) == 0
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert (bad["row"], bad["file"]) == (2, str(tmp_path / "mine_en.json"))
    assert len(pq.read_table(tmp_path / "out" / "pairs.parquet")) == 1


def test_questions_command_summarizes_a_source(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["questions", str(data / "bmlama17"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["format"], summary["rows"], summary["kept"]) == ("bmlama", 8 * 6792, 8 * 6792)
    assert main(["questions", str(data / "bmlama17")]) == 0
    assert "6,792" in capsys.readouterr().out
    (tmp_path / "bad_en.jsonl").write_text('{"question_id": "1", "language": "en", "text": "?", "choices": ["a"]}\n')
    assert main(["questions", str(tmp_path / "bad_en.jsonl")]) == 2
    assert "bad_en.jsonl, row 1: a question must have 2 to 26 choices" in capsys.readouterr().err
    assert main(["questions", str(tmp_path / "bad_en.jsonl"), "--on-bad-row", "skip"]) == 0


@pytest.fixture(scope="module")
def gold_run(make_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of `dpo_gold`, which only trains on pairs whose chosen answer is correct."""
    folder = tmp_path_factory.mktemp("gold")
    return align(make_recipe, folder, "gold", method="dpo_gold")


def align(make_recipe: Callable[..., Path], folder: Path, name: str, **changes: Any) -> RunDirectory:
    """Runs a recipe with these changes."""
    recipe = make_recipe(name=name, storage=str(folder), **changes)
    assert main(["align", str(recipe)]) == 0
    return RunDirectory(str(folder), name)


@pytest.mark.slow
def test_gold_baseline_trains_on_correct_pairs(gold_run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    gold = {row["question_id"]: row["gold"] for row in rows_of(gold_run.questions("align").read())}
    pairs = rows_of(gold_run.stage(1, "pairs").read())
    assert pairs
    assert all(pair["chosen_answer"] == gold[pair["question_id"]] for pair in pairs)
    capsys.readouterr()
    assert main(["stats", gold_run.uri]) == 0
    assert "chosen right 100.0" in capsys.readouterr().out
    assert main(["stats", gold_run.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == len(pairs)
    assert main(["stats", gold_run.uri, "--round", "7"]) == 2
    assert "round 7 has no pairs yet" in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_from_a_runs_samples_include_its_own(gold_run: RunDirectory, tmp_path: Path) -> None:
    """The command pairs by vote, while the run kept only the correct pairs."""
    sample = gold_run.stage(1, "sample").storage.uri()
    assert main(["pairs", "--completions", sample, "--out", str(tmp_path / "out")]) == 0
    exported = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    key = ("question_id", "language", "chosen_answer", "rejected_answer", "rejected")
    kept = {tuple(row[name] for name in key) for row in rows_of(gold_run.stage(1, "pairs").read())}
    assert kept <= {tuple(row[name] for name in key) for row in exported}


@pytest.mark.slow
def test_split_with_bad_rows_and_more_evaluation_languages(
    make_recipe: Callable[..., Path], question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    lines = question_files[0].read_text().splitlines()
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join([*lines, '{"question_id": "bad", "language": "en", "text": "?", "choices": []}']))
    run = align(
        make_recipe, tmp_path, "split", languages=["fr"],
        questions={
            "align": str(file), "evaluate": None, "on_bad_row": "skip", "split": {"train": 16, "seed": 1},
            "evaluate_languages": ["en", "fr"],
        },
        preferences={"preset": "released"},
    )  # fmt: skip
    align_ids, held_out = (
        {row["question_id"] for row in rows_of(run.questions(split).read())} for split in ("align", "held_out")
    )
    assert (len(align_ids), len(held_out)) == (16, 8)
    assert not align_ids & held_out
    assert {row["language"] for row in rows_of(run.questions("align").read())} == {"fr"}
    (bad,) = [json.loads(line) for line in run.questions("align").storage.read("bad_rows.jsonl").splitlines()]
    assert bad["row"] == len(lines) + 1
    assert set(run.summary["rounds"][0]["accuracy"]) == {"en", "fr"}
    assert run.config["preferences"]["extraction"] == "released"


@pytest.mark.slow
def test_questions_that_fail_to_translate_do_not_vote(
    make_recipe: Callable[..., Path], question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The small model cannot translate, so every reply of the real engines is rejected; the run still completes."""
    rows = [json.loads(line) for line in question_files[0].read_text().splitlines()]
    file = tmp_path / "english.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["language"] == "en"))
    questions = {"align": str(file), "evaluate": str(question_files[1]), "translate": "model"}
    run = align(make_recipe, tmp_path, "monolingual", questions=questions)
    record = run.questions("align").record["translated"]["fr"]
    assert record["asked"] == record["failed"] == 24
    assert run.questions("held_out").record["translated"] == {}
    assert {row["language"] for row in rows_of(run.stage(1, "sample").read())} == {"en"}
    assert {row["by_language"]["en"] for row in rows_of(run.stage(1, "votes").read())} - {None}
    assert set(run.summary["rounds"][-1]["accuracy"]) == {"en", "fr"}
    assert (tmp_path / ".translations").is_dir()
