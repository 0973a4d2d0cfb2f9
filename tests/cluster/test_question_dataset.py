"""Questions as a Ray Data set, on real Ray: the same rows as the reader in one process, a task for each file."""

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


def write(folder: Path, count: int, **changed: Any) -> None:
    for code in LANGUAGES:
        rows = [{**question(f"q{i}", code, gold="B"), **(changed if i == 7 else {})} for i in range(count)]
        (folder / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def by_key(row: dict[str, Any]) -> tuple[str, str]:
    return row["question_id"], row["language"]


def test_the_rows_are_those_of_the_reader_in_blocks(tmp_path: Path) -> None:
    write(tmp_path, 2 * BLOCK + 10)
    read = question_dataset(str(tmp_path)).materialize()
    rows = [dict(row) for row in read_questions(str(tmp_path), LANGUAGES)]
    assert sorted(read.take_all(), key=by_key) == sorted(rows, key=by_key)
    assert list(read.schema().names) == schema(Question).names
    two = question_dataset(str(tmp_path / "{language}.jsonl"), languages=["fr", "zh"])
    assert {row["language"] for row in two.take_all()} == {"fr", "zh"}


def test_bad_rows_end_the_task_or_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 20, gold="Z")
    with pytest.raises(InputError, match="row 8: the gold answer is none of the choices"):
        question_dataset(str(tmp_path)).take_all()
    assert question_dataset(str(tmp_path), on_bad_row="skip").count() == 3 * 19
    with pytest.raises(InputError, match="there is no such file"):
        question_dataset(str(tmp_path / "none.jsonl"))


def test_the_files_of_bmlama(data: Path) -> None:
    read = question_dataset(str(data / "bmlama17")).materialize()
    assert read.count() == 8 * 6792
    assert read.num_blocks() == 8  # one task for each file
