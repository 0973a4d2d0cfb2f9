import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from factories import question

from calm_ray.errors import InputError
from calm_ray.questions.reader import read_questions, write_chunks
from calm_ray.rows import Question, rows_of, table
from calm_ray.rundir import Stage
from calm_ray.storage import Storage

GOOD = [question(q, code, gold="B") for q in ("q1", "q2", "q3") for code in ("en", "fr")]


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def changed(number: int, **fields: Any) -> list[Any]:
    return [{**row, **fields} if i == number else row for i, row in enumerate(GOOD)]


def test_jsonl_and_parquet_read_alike(tmp_path: Path) -> None:
    pq.write_table(table(Question, GOOD), tmp_path / "questions.parquet")
    from_json = read_questions(jsonl(tmp_path, GOOD), ["fr", "en"])
    assert from_json == read_questions(str(tmp_path / "questions.parquet"), ["fr", "en"])
    assert [(row["question_id"], row["language"]) for row in from_json[:3]] == [
        ("q1", "fr"),
        ("q1", "en"),
        ("q2", "fr"),
    ]


def test_other_languages_and_absent_gold_are_fine(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key not in ("gold", "subject")} for row in GOOD]
    read = read_questions(jsonl(tmp_path, rows), ["en"])
    assert {row["language"] for row in read} == {"en"}
    assert {row["gold"] for row in read} == {None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:5], "row 5: question 'q3' is not there in fr"),
        (changed(3, choices=["a", "b"]), "row 4: question 'q2' has 2 choices in 'fr', but 4 in 'en' (row 3)"),
        (changed(3, gold="A"), "row 4: question 'q2' has gold 'A' in 'fr', but 'B' in 'en' (row 3)"),
        (changed(2, text=""), "row 3: field 'text' is missing or empty"),
        (changed(2, choices="abc"), "row 3: field 'choices' must be a list of texts"),
        (changed(2, choices=["a"]), "row 3: field 'choices' has 1 entries; it must have 2 to 26"),
        (changed(2, gold="E"), "row 3: field 'gold' is 'E'; it must be a letter from A to D"),
        ([*GOOD, GOOD[0]], "row 7: question 'q1' in 'en' was there in row 1"),
        (["text"], "row 1: is not a record"),
        ([], "holds no question in en, fr"),
    ],
)
def test_bad_rows_are_refused_by_file_and_row(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = jsonl(tmp_path, rows)
    with pytest.raises(InputError) as refused:
        read_questions(path, ["en", "fr"])
    assert message in str(refused.value)
    assert path in str(refused.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_questions(str(tmp_path / "none.jsonl"), ["en"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question_id": "q1"\n')
    with pytest.raises(InputError, match="row 1: not readable as JSON"):
        read_questions(str(broken), ["en"])
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_questions(str(torn), ["en"])


def test_evaluation_needs_gold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 2: field 'gold' is missing"):
        read_questions(jsonl(tmp_path, changed(1, gold=None)), ["en", "fr"], needs_gold=True)


def test_chunks_hold_the_same_questions_in_all_languages(tmp_path: Path) -> None:
    stage = Stage(Storage(str(tmp_path)))
    write_chunks(GOOD, stage, prompts_per_chunk=2)
    assert stage.chunks() == {"00000", "00001"}
    first = rows_of(stage.read_chunk("00000"))
    assert [(row["question_id"], row["language"]) for row in first] == [
        ("q1", "en"), ("q1", "fr"), ("q2", "en"), ("q2", "fr"),
    ]  # fmt: skip
    assert rows_of(stage.read()) == GOOD
