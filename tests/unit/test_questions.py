import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from factories import question, read_questions

from calm_ray.commands.questions import print_survey, show_questions
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question, rows_of, table
from calm_ray.questions.reader import take_in, write_chunks
from calm_ray.questions.sources import open_source
from calm_ray.questions.survey import survey
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

GOOD = [question(q, code, gold="B") for q in ("q1", "q2", "q3") for code in ("en", "fr")]


def jsonl(folder: Path, rows: list[Any], name: str = "questions.jsonl") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def changed(number: int, **fields: Any) -> list[Any]:
    return [{**row, **fields} if i == number else row for i, row in enumerate(GOOD)]


def ids(questions: list[Question]) -> list[tuple[str, str]]:
    return [(row["question_id"], row["language"]) for row in questions]


def test_jsonl_json_and_parquet_read_alike(tmp_path: Path) -> None:
    pq.write_table(table(Question, GOOD), tmp_path / "questions.parquet")
    (tmp_path / "questions.json").write_text(json.dumps(GOOD, indent=1))
    from_lines = read_questions(jsonl(tmp_path, GOOD), ["fr", "en"])
    assert from_lines == read_questions(str(tmp_path / "questions.parquet"), ["fr", "en"])
    assert from_lines == read_questions(str(tmp_path / "questions.json"), ["fr", "en"])
    assert ids(from_lines)[:3] == [("q1", "fr"), ("q1", "en"), ("q2", "fr")]


def test_other_languages_and_absent_gold_are_fine(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key not in ("gold", "subject")} for row in GOOD]
    read = read_questions(jsonl(tmp_path, rows), ["en"])
    assert {row["language"] for row in read} == {"en"}
    assert {row["gold"] for row in read} == {None}


def test_the_id_may_be_a_number_and_the_language_any_of_its_names(tmp_path: Path) -> None:
    rows = [{**question(code, code), "question_id": 0, "language": code} for code in ("cn", "EN")]
    assert ids(read_questions(jsonl(tmp_path, rows), ["en", "zh"])) == [("0", "en"), ("0", "zh")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GOOD[:5], "row 5: not in all languages: question 'q3' is not there in fr"),
        (changed(3, choices=["a", "b"]), "row 4: the languages differ in choices: question 'q2' has 2 choices in 'fr'"),
        (changed(3, choices=["a", "b"]), "but 4 in 'en' (row 3)"),
        (changed(3, gold="A"), "question 'q2' has gold 'A' in 'fr', but 'B' in 'en' (row 3)"),
        (changed(2, text=""), "row 3: field 'text' is missing or empty"),
        (changed(2, text=" "), "row 3: the text is empty"),
        (changed(2, text=7), "row 3: field 'text' is not a text: 7"),
        (changed(2, choices="abc"), "row 3: field 'choices' must be a list of texts"),
        (changed(2, choices=[]), "row 3: a question must have 2 to 26 choices: it has 0"),
        (changed(2, choices=["a"]), "row 3: a question must have 2 to 26 choices: it has 1"),
        (changed(2, choices=["a"] * 27), "row 3: a question must have 2 to 26 choices: it has 27"),
        (changed(2, choices=["a", " "]), "row 3: a choice is empty: B"),
        (changed(2, gold="E"), "row 3: the gold answer is none of the choices: 'E' of A to D"),
        (changed(2, gold="AB"), "row 3: the gold answer is none of the choices: 'AB'"),
        (changed(2, language="xx"), "row 3: no known language: 'xx'; known are en, zh"),
        (changed(2, language=None), "row 3: field 'language' is missing or empty"),
        ([*GOOD, GOOD[0]], "row 7: the question was there already: 'q1' in 'en' is in row 1"),
        ([GOOD[0], "text"], "row 2: is not a record"),
        (["text"], "row 1: is not a record"),
        ([], "holds no rows"),
        ([row for row in GOOD if row["language"] == "en"], "holds no question in fr"),
    ],
)
def test_bad_rows_are_refused_by_file_and_row(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = jsonl(tmp_path, rows)
    with pytest.raises(InputError) as refused:
        read_questions(path, ["en", "fr"])
    assert message in str(refused.value)
    assert path in str(refused.value)


def test_every_bad_row_is_named_up_to_twenty(tmp_path: Path) -> None:
    rows = [question(f"q{i}", gold="Z") for i in range(23)]
    with pytest.raises(InputError) as refused:
        read_questions(jsonl(tmp_path, rows), ["en"])
    lines = str(refused.value).split("\n")
    assert [f"row {i}:" in line for i, line in enumerate(lines[:20], start=1)] == [True] * 20
    assert lines[20] == "and 3 more"
    assert "--on-bad-row skip" in lines[21]


def test_skip_leaves_out_a_question_in_all_its_languages(tmp_path: Path) -> None:
    rows = [question(f"q{i}", code, gold="A") for i in range(6) for code in ("en", "fr")]
    rows[1]["text"] = ""  # q0 in fr
    rows[3]["gold"] = "B"  # q1 in fr
    rows[5]["choices"] = ["a", "b"]  # q2 in fr
    del rows[7]  # q3 in fr
    path = jsonl(tmp_path, [*rows, rows[-1]])
    taken = take_in(path, ["en", "fr"], on_bad_row="skip")
    assert ids(taken.questions) == [("q4", "en"), ("q4", "fr"), ("q5", "en"), ("q5", "fr")]
    assert [problem.row for problem in taken.left_out] == [2, 12, 4, 6, 1, 7]
    assert "q0" in taken.left_out[4].reason
    with pytest.raises(InputError, match="no question is left"):
        read_questions(jsonl(tmp_path, rows[:6]), ["en", "fr"], on_bad_row="skip")


def test_languages_to_be_translated_may_be_missing(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD[:5])
    assert len(read_questions(path, ["en", "fr"], allow_missing=["fr"])) == 5
    assert ids(read_questions(path, ["en", "de"], allow_missing=["de"])) == [(f"q{i}", "en") for i in (1, 2, 3)]
    with pytest.raises(InputError, match="row 5: not in all languages: question 'q3' is not there in fr"):
        read_questions(path, ["en", "fr", "de"], allow_missing=["de"])


def test_evaluation_needs_gold_in_one_language(tmp_path: Path) -> None:
    assert len(read_questions(jsonl(tmp_path, changed(1, gold=None)), ["en", "fr"], needs_gold=True)) == 6
    rows = [{**row, "gold": None} if row["question_id"] == "q2" else row for row in GOOD]
    with pytest.raises(InputError, match="row 3: field 'gold' is missing: question 'q2'"):
        read_questions(jsonl(tmp_path, rows), ["en", "fr"], needs_gold=True)


def test_sources_are_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("en", "fr"):
        jsonl(tmp_path, [row for row in GOOD if row["language"] == code], f"deep/{code}/{code}.jsonl")
        jsonl(tmp_path, [row for row in GOOD if row["language"] == code], f"flat/{code}.jsonl")
    (tmp_path / "flat" / "notes.txt").write_text("no data")
    (tmp_path / "flat" / "dataset_info.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    read = read_questions(str(tmp_path / "flat"), ["en", "fr"])
    assert sorted(ids(read)) == sorted(ids(GOOD))
    for source in (f"{tmp_path}/deep/**/*.jsonl", f"{tmp_path}/flat/{{language}}.jsonl", "~/flat", "~/flat/*.jsonl"):
        assert read_questions(source, ["en", "fr"]) == read
    for source in (f"{tmp_path}/none.jsonl", f"{tmp_path}/none*", f"{tmp_path}/deep", f"{tmp_path}/{{language}}.csv"):
        with pytest.raises(InputError, match="there is no such file"):
            read_questions(source, ["en"])
    with pytest.raises(InputError, match="suffix"):
        read_questions(f"{tmp_path}/flat/notes.txt", ["en"])


def test_a_question_that_is_there_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    first, second = (jsonl(tmp_path, GOOD[:2], f"{name}.jsonl") for name in ("a", "b"))
    with pytest.raises(InputError) as refused:
        read_questions(str(tmp_path), ["en", "fr"])
    assert f"{second}, row 1: the question was there already: 'q1' in 'en' is in {first}, row 1" in str(refused.value)


def test_files_of_two_formats_are_refused_with_both_names(tmp_path: Path) -> None:
    first = jsonl(tmp_path, GOOD, "a.jsonl")
    second = jsonl(tmp_path, [{"instruction": "", "input": "Q\nA. a\nB. b", "output": "A"}], "b_en.jsonl")
    with pytest.raises(InputError) as refused:
        open_source(str(tmp_path))
    assert f"{first} is questions, {second} is calm" in str(refused.value)


def test_fields_of_no_known_format_name_what_the_nearest_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest is questions, which also has language"):
        open_source(jsonl(tmp_path, [{"question_id": "q", "text": "t", "choices": []}]))
    with pytest.raises(InputError, match="format: 'cvs' is not known; known are questions, xcsqa"):
        open_source(jsonl(tmp_path, GOOD), format="cvs")
    with pytest.raises(InputError, match="language: 'xx' is no known language"):
        open_source(jsonl(tmp_path, GOOD), language="xx")


def test_the_hub_is_read_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a folder of the data set's name, the hub's own client reads that."""
    jsonl(tmp_path, GOOD, "owner/name/test.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    from_hub = read_questions("hub:owner/name::test", ["en", "fr"])
    assert from_hub == GOOD
    assert from_hub == read_questions("hub:owner/name", ["en", "fr"])
    with pytest.raises(InputError, match="hub:nobody/nothing: not to be had from the hub: "):
        read_questions("hub:nobody/nothing", ["en"])
    for wrong in ("hub:name", "hub:a/b:c:d:e"):
        with pytest.raises(InputError, match="is named hub:owner/name"):
            read_questions(wrong, ["en"])
    with pytest.raises(InputError, match="which languages"):
        survey("hub:owner/name:{language}")


def test_the_survey_counts_what_is_there(tmp_path: Path) -> None:
    rows: list[Any] = [question(f"q{i}", code, gold="A") for i in range(12) for code in ("en", "fr")]
    rows[0]["gold"] = "a"  # q0 in en: repaired
    rows[1]["gold"] = None  # q0 in fr
    rows[3]["gold"] = "B"  # q1 in fr contradicts en
    rows[4]["text"] = ""  # q2 in en
    rows[6]["choices"] = ["a", "a", "b"]  # q3 in en: repaired; fr has four
    rows[8]["text"] = rows[10]["text"]  # q4 in en is q5
    rows += [{**rows[11], "question_id": "q12", "choices": ["a", "b"]}, {**rows[12], "gold": "Z"}]
    found = survey(jsonl(tmp_path, rows))
    assert (found.format, found.files, found.rows, found.kept) == ("questions", [found.source], 26, 22)
    assert found.repaired == {"the gold letter was lower case": 1, "two choices have the same text; kept": 1}
    assert found.refused == {
        "field 'text' is missing or empty": 1,
        "the gold answer is none of the choices": 1,
        "the languages differ in choices": 1,
        "the languages differ in gold": 1,
    }
    en, fr = found.languages["en"], found.languages["fr"]
    assert (en.questions, en.fewest_choices, en.most_choices, en.with_gold) == (11, 3, 4, 11)
    assert (fr.questions, fr.fewest_choices, fr.most_choices, fr.with_gold) == (11, 2, 4, 10)
    assert (en.missing, fr.missing) == (2, 2)  # q2 and q12; q1 and q3
    assert (en.duplicates, fr.duplicates) == (1, 0)
    assert [problem.row for problem in found.bad_rows] == [5, 26, 4, 8]
    assert [problem.row for problem in found.notes] == [1, 7]
    assert [row["question_id"] for row in found.first[:3]] == ["q0", "q0", "q1"]
    assert len(found.first) == 10
    assert json.loads(json.dumps(found.as_json()))["languages"]["fr"]["missing"] == 2


def test_the_survey_is_printed_before_bad_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path, changed(2, gold="E"))
    with pytest.raises(InputError, match="row 3: the gold answer is none of the choices"):
        show_questions(path)
    printed = capsys.readouterr().out
    assert "6 rows: 5 kept, 0 repairs or remarks, 1 refused" in printed
    assert "1 x the gold answer is none of the choices" in printed
    assert "q1 in en, gold B" in printed
    show_questions(path, on_bad_row="skip", as_json=True)
    assert json.loads(capsys.readouterr().out)["kept"] == 5
    print_survey(survey(path), rows=0)
    assert "q1 in en" not in capsys.readouterr().out


def test_chunks_hold_the_same_questions_in_all_languages(tmp_path: Path) -> None:
    stage = Stage(Storage(str(tmp_path)))
    write_chunks(GOOD, stage, prompts_per_chunk=2)
    assert stage.chunks() == {"00000", "00001"}
    first = rows_of(stage.read_chunk("00000"))
    assert ids(first) == [("q1", "en"), ("q1", "fr"), ("q2", "en"), ("q2", "fr")]
    assert rows_of(stage.read()) == GOOD
