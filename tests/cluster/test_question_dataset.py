"""Questions as a Ray Dataset, on real Ray: the same rows as from the reader, with one task per file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from factories import question, read_questions

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question, schema
from calm_ray.questions.dataset import BLOCK, question_dataset

pytestmark = pytest.mark.usefixtures("ray_8_cpus")

LANGUAGES = ["en", "fr", "zh"]


def write_questions(folder: Path, count: int, **changes_to_q7: Any) -> None:
    for code in LANGUAGES:
        rows = [{**question(f"q{i}", code, gold="B"), **(changes_to_q7 if i == 7 else {})} for i in range(count)]
        (folder / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def by_key(row: dict[str, Any]) -> tuple[str, str]:
    return row["question_id"], row["language"]


def test_dataset_has_the_same_rows_as_the_reader(tmp_path: Path) -> None:
    write_questions(tmp_path, 2 * BLOCK + 10)
    dataset = question_dataset(str(tmp_path)).materialize()
    rows = [dict(row) for row in read_questions(str(tmp_path), LANGUAGES)]
    assert sorted(dataset.take_all(), key=by_key) == sorted(rows, key=by_key)
    assert list(dataset.schema().names) == schema(Question).names
    two_languages = question_dataset(str(tmp_path / "{language}.jsonl"), languages=["fr", "zh"])
    assert {row["language"] for row in two_languages.take_all()} == {"fr", "zh"}


def test_bad_rows_raise_or_are_skipped(tmp_path: Path) -> None:
    write_questions(tmp_path, 20, gold="Z")
    with pytest.raises(InputError, match="row 8: the gold answer is not one of the choices"):
        question_dataset(str(tmp_path)).take_all()
    assert question_dataset(str(tmp_path), on_bad_row="skip").count() == 3 * 19
    with pytest.raises(InputError, match="no question files found"):
        question_dataset(str(tmp_path / "none.jsonl"))


def test_bmlama_takes_one_task_per_file(data: Path) -> None:
    dataset = question_dataset(str(data / "bmlama17")).materialize()
    assert dataset.count() == 8 * 6792
    assert dataset.num_blocks() == 8
