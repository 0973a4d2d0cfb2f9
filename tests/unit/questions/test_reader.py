import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from factories import question, read_questions

from calm_ray.commands.questions import print_survey, show_questions
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question, rows_of, table
from calm_ray.questions.reader import load_questions, write_chunks
from calm_ray.questions.sources import open_source
from calm_ray.questions.survey import survey
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

GOOD = [question(q, code, gold="B") for q in ("q1", "q2", "q3") for code in ("en", "fr")]


def write_jsonl(folder: Path, rows: list[Any], name: str = "questions.jsonl") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def rows_with(number: int, **fields: Any) -> list[Any]:
    return [{**row, **fields} if i == number else row for i, row in enumerate(GOOD)]


def ids(questions: list[Question]) -> list[tuple[str, str]]:
    return [(row["question_id"], row["language"]) for row in questions]


def test_jsonl_json_and_parquet_give_the_same_questions(tmp_path: Path) -> None:
    pq.write_table(table(Question, GOOD), tmp_path / "questions.parquet")
    (tmp_path / "questions.json").write_text(json.dumps(GOOD, indent=1))
    from_lines = read_questions(write_jsonl(tmp_path, GOOD), ["fr", "en"])
    assert from_lines == read_questions(str(tmp_path / "questions.parquet"), ["fr", "en"])
    assert from_lines == read_questions(str(tmp_path / "questions.json"), ["fr", "en"])
    assert ids(from_lines)[:3] == [("q1", "fr"), ("q1", "en"), ("q2", "fr")]


def test_other_languages_and_missing_gold_are_accepted(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key not in ("gold", "subject")} for row in GOOD]
    read = read_questions(write_jsonl(tmp_path, rows), ["en"])
    assert {row["language"] for row in read} == {"en"}
    assert {row["gold"] for row in read} == {None}


def test_numeric_ids_and_language_aliases_are_accepted(tmp_path: Path) -> None:
    rows = [{**question(code, code), "question_id": 0, "language": code} for code in ("cn", "EN")]
    assert ids(read_questions(write_jsonl(tmp_path, rows), ["en", "zh"])) == [("0", "en"), ("0", "zh")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:5], "row 5: missing in some languages: question 'q3' is missing in fr"),
        (
            rows_with(3, choices=["a", "b"]),
            "row 4: number of choices differs between languages: question 'q2' has 2 choices in 'fr'",
        ),
        (rows_with(3, choices=["a", "b"]), "but 4 in 'en' (row 3)"),
        (rows_with(3, gold="A"), "question 'q2' has gold 'A' in 'fr', but 'B' in 'en' (row 3)"),
        (rows_with(2, text=""), "row 3: field 'text' is missing or empty"),
        (rows_with(2, text=" "), "row 3: the text is empty"),
        (rows_with(2, text=7), "row 3: field 'text' is not a string: 7"),
        (rows_with(2, choices="abc"), "row 3: field 'choices' must be a list of strings"),
        (rows_with(2, choices=[]), "row 3: a question must have 2 to 26 choices: it has 0"),
        (rows_with(2, choices=["a"]), "row 3: a question must have 2 to 26 choices: it has 1"),
        (rows_with(2, choices=["a"] * 27), "row 3: a question must have 2 to 26 choices: it has 27"),
        (rows_with(2, choices=["a", " "]), "row 3: a choice is empty: B"),
        (rows_with(2, gold="E"), "row 3: the gold answer is not one of the choices: 'E'; choices are A to D"),
        (rows_with(2, gold="AB"), "row 3: the gold answer is not one of the choices: 'AB'"),
        (rows_with(2, language="xx"), "row 3: unknown language: 'xx'; known languages: en, zh"),
        (rows_with(2, language=None), "row 3: field 'language' is missing or empty"),
        ([*GOOD, GOOD[0]], "row 7: duplicate question: 'q1' in 'en' is already in row 1"),
        ([GOOD[0], "text"], "row 2: is not a record"),
        (["text"], "row 1: is not a record"),
        ([], "contains no rows"),
        ([row for row in GOOD if row["language"] == "en"], "contains no questions in fr"),
    ],
)
def test_bad_rows_are_reported_with_file_and_row(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write_jsonl(tmp_path, rows)
    with pytest.raises(InputError) as refused:
        read_questions(path, ["en", "fr"])
    assert message in str(refused.value)
    assert path in str(refused.value)


def test_at_most_twenty_bad_rows_are_listed(tmp_path: Path) -> None:
    rows = [question(f"q{i}", gold="Z") for i in range(23)]
    with pytest.raises(InputError) as refused:
        read_questions(write_jsonl(tmp_path, rows), ["en"])
    lines = str(refused.value).split("\n")
    assert [f"row {i}:" in line for i, line in enumerate(lines[:20], start=1)] == [True] * 20
    assert lines[20] == "and 3 more"
    assert "--on-bad-row skip" in lines[21]


def test_skip_drops_a_question_in_all_languages(tmp_path: Path) -> None:
    rows = [question(f"q{i}", code, gold="A") for i in range(6) for code in ("en", "fr")]
    rows[1]["text"] = ""  # q0 in fr
    rows[3]["gold"] = "B"  # q1 in fr
    rows[5]["choices"] = ["a", "b"]  # q2 in fr
    del rows[7]  # q3 in fr
    path = write_jsonl(tmp_path, [*rows, rows[-1]])
    loaded = load_questions(path, ["en", "fr"], on_bad_row="skip")
    assert ids(loaded.questions) == [("q4", "en"), ("q4", "fr"), ("q5", "en"), ("q5", "fr")]
    assert [problem.row for problem in loaded.skipped] == [2, 12, 4, 6, 1, 7]
    assert "q0" in loaded.skipped[4].reason
    with pytest.raises(InputError, match="no question is left"):
        read_questions(write_jsonl(tmp_path, rows[:6]), ["en", "fr"], on_bad_row="skip")


def test_languages_to_translate_may_be_missing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, GOOD[:5])
    assert len(read_questions(path, ["en", "fr"], allow_missing=["fr"])) == 5
    assert ids(read_questions(path, ["en", "de"], allow_missing=["de"])) == [(f"q{i}", "en") for i in (1, 2, 3)]
    with pytest.raises(InputError, match="row 5: missing in some languages: question 'q3' is missing in fr"):
        read_questions(path, ["en", "fr", "de"], allow_missing=["de"])


def test_evaluation_needs_gold_in_at_least_one_language(tmp_path: Path) -> None:
    assert len(read_questions(write_jsonl(tmp_path, rows_with(1, gold=None)), ["en", "fr"], needs_gold=True)) == 6
    rows = [{**row, "gold": None} if row["question_id"] == "q2" else row for row in GOOD]
    with pytest.raises(InputError, match="row 3: field 'gold' is missing: question 'q2'"):
        read_questions(write_jsonl(tmp_path, rows), ["en", "fr"], needs_gold=True)


def test_sources_can_be_files_folders_or_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("en", "fr"):
        write_jsonl(tmp_path, [row for row in GOOD if row["language"] == code], f"deep/{code}/{code}.jsonl")
        write_jsonl(tmp_path, [row for row in GOOD if row["language"] == code], f"flat/{code}.jsonl")
    (tmp_path / "flat" / "notes.txt").write_text("no data")
    (tmp_path / "flat" / "dataset_info.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    read = read_questions(str(tmp_path / "flat"), ["en", "fr"])
    assert sorted(ids(read)) == sorted(ids(GOOD))
    for source in (f"{tmp_path}/deep/**/*.jsonl", f"{tmp_path}/flat/{{language}}.jsonl", "~/flat", "~/flat/*.jsonl"):
        assert read_questions(source, ["en", "fr"]) == read
    for source in (f"{tmp_path}/none.jsonl", f"{tmp_path}/none*", f"{tmp_path}/deep", f"{tmp_path}/{{language}}.csv"):
        with pytest.raises(InputError, match="no question files found"):
            read_questions(source, ["en"])
    with pytest.raises(InputError, match="suffix"):
        read_questions(f"{tmp_path}/flat/notes.txt", ["en"])


def test_duplicate_across_files_is_reported_with_both_files(tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path, GOOD[:2], f"{name}.jsonl") for name in ("a", "b"))
    with pytest.raises(InputError) as refused:
        read_questions(str(tmp_path), ["en", "fr"])
    assert f"{second}, row 1: duplicate question: 'q1' in 'en' is already in {first}, row 1" in str(refused.value)


def test_mixed_formats_are_refused_naming_both_files(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path, GOOD, "a.jsonl")
    second = write_jsonl(tmp_path, [{"instruction": "", "input": "Q\nA. a\nB. b", "output": "A"}], "b_en.jsonl")
    with pytest.raises(InputError) as refused:
        open_source(str(tmp_path))
    assert f"{first} is questions, {second} is calm" in str(refused.value)


def test_unknown_format_error_names_the_closest_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="closest is questions, which also needs language"):
        open_source(write_jsonl(tmp_path, [{"question_id": "q", "text": "t", "choices": []}]))
    with pytest.raises(InputError, match="format: unknown format 'cvs'; known formats: questions, xcsqa"):
        open_source(write_jsonl(tmp_path, GOOD), format="cvs")
    with pytest.raises(InputError, match="language: unknown language 'xx'"):
        open_source(write_jsonl(tmp_path, GOOD), language="xx")


def test_hub_sources_are_read_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the Hub client reads a local folder with the data set's name."""
    write_jsonl(tmp_path, GOOD, "owner/name/test.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    from_hub = read_questions("hub:owner/name::test", ["en", "fr"])
    assert from_hub == GOOD
    assert from_hub == read_questions("hub:owner/name", ["en", "fr"])
    with pytest.raises(InputError, match="hub:nobody/nothing: cannot be loaded from the Hub: "):
        read_questions("hub:nobody/nothing", ["en"])
    for wrong in ("hub:name", "hub:a/b:c:d:e"):
        with pytest.raises(InputError, match="is not a Hub dataset; write hub:owner/name"):
            read_questions(wrong, ["en"])
    with pytest.raises(InputError, match="needs a list of languages"):
        survey("hub:owner/name:{language}")


def test_survey_counts_rows_repairs_and_problems(tmp_path: Path) -> None:
    rows: list[Any] = [question(f"q{i}", code, gold="A") for i in range(12) for code in ("en", "fr")]
    rows[0]["gold"] = "a"  # q0 in en: repaired
    rows[1]["gold"] = None  # q0 in fr
    rows[3]["gold"] = "B"  # q1 in fr contradicts en
    rows[4]["text"] = ""  # q2 in en
    rows[6]["choices"] = ["a", "a", "b"]  # q3 in en: repaired; fr has four
    rows[8]["text"] = rows[10]["text"]  # q4 in en is q5
    rows += [{**rows[11], "question_id": "q12", "choices": ["a", "b"]}, {**rows[12], "gold": "Z"}]
    found = survey(write_jsonl(tmp_path, rows))
    assert (found.format, found.files, found.rows, found.kept) == ("questions", [found.source], 26, 22)
    assert found.repaired == {"the gold letter was lowercase": 1, "two choices have the same text; kept": 1}
    assert found.refused == {
        "field 'text' is missing or empty": 1,
        "the gold answer is not one of the choices": 1,
        "number of choices differs between languages": 1,
        "gold letter differs between languages": 1,
    }
    en, fr = found.languages["en"], found.languages["fr"]
    assert (en.questions, en.min_choices, en.max_choices, en.with_gold) == (11, 3, 4, 11)
    assert (fr.questions, fr.min_choices, fr.max_choices, fr.with_gold) == (11, 2, 4, 10)
    assert (en.missing, fr.missing) == (2, 2)  # q2 and q12; q1 and q3
    assert (en.duplicates, fr.duplicates) == (1, 0)
    assert [problem.row for problem in found.bad_rows] == [5, 26, 4, 8]
    assert [problem.row for problem in found.notes] == [1, 7]
    assert [row["question_id"] for row in found.first[:3]] == ["q0", "q0", "q1"]
    assert len(found.first) == 10
    assert json.loads(json.dumps(found.as_json()))["languages"]["fr"]["missing"] == 2


def test_survey_is_printed_before_bad_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path, rows_with(2, gold="E"))
    with pytest.raises(InputError, match="row 3: the gold answer is not one of the choices"):
        show_questions(path)
    printed = capsys.readouterr().out
    assert "6 rows: 5 kept, 0 repairs or remarks, 1 refused" in printed
    assert "1 x the gold answer is not one of the choices" in printed
    assert "q1 in en, gold B" in printed
    show_questions(path, on_bad_row="skip", as_json=True)
    assert json.loads(capsys.readouterr().out)["kept"] == 5
    print_survey(survey(path), rows=0)
    assert "q1 in en" not in capsys.readouterr().out


def test_chunks_contain_each_question_in_all_languages(tmp_path: Path) -> None:
    stage = Stage(Storage(str(tmp_path)))
    write_chunks(GOOD, stage, prompts_per_chunk=2)
    assert stage.chunks() == {"00000", "00001"}
    first = rows_of(stage.read_chunk("00000"))
    assert ids(first) == [("q1", "en"), ("q1", "fr"), ("q2", "en"), ("q2", "fr")]
    assert rows_of(stage.read()) == GOOD
