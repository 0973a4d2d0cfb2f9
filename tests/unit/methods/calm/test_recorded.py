"""Recorded completions in both layouts: chunks and pairs made of them, and errors that name file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import completions, question

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Completion, Question, table
from calm_ray.methods.calm.from_columns import PAIRS, make_pairs
from calm_ray.methods.calm.import_completions import QUESTIONS_PER_CHUNK, open_completions
from calm_ray.methods.calm.recorded import RecordedChunks
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_report import sample_report
from calm_ray.run.directory import RunDirectory
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

MARKERS = {"en": "Answer:", "cn": "答案:", "fr": "Réponse:"}


def record(answers: str, language: str, gold: str = "B", options: int = 4, number: int = 0) -> dict[str, Any]:
    """A record whose completions answer with these letters; `-` has no answer, `0` is null."""
    lines = [f"{letter}. {language} option {letter}" for letter in "ABCDEFGHIJ"[:options]]
    texts = [None if a == "0" else "Hm." if a == "-" else f"x\n{MARKERS[language]} {a}" for a in answers]
    return {"instruction": "?", "input": "\n".join([f"Q{number} ?", *lines]), "output": gold, "pred": texts}


def write_records(folder: Path, **records: list[dict[str, Any]]) -> str:
    for language, rows in records.items():
        (folder / f"x_csqa_{language}_train_sampled.json").write_text(json.dumps(rows, ensure_ascii=False))
    return str(folder)


def import_recorded(*sources: str, work: Path, **options: Any) -> tuple[RecordedChunks, list[str]]:
    arguments = {"questions": None, "on_bad_row": "refuse", "own_codes": False, **options}
    imported = open_completions(sources, Stage(Storage(str(work / "work"))), **arguments)
    return imported.chunks, [str(problem) for problem in imported.skipped]


def pairs_of(chunks: RecordedChunks, preferences: Preferences | None = None) -> tuple[list[dict[str, Any]], Any]:
    (name,) = chunks.chunks
    pairs, counts = make_pairs(chunks.read(name), preferences or Preferences(), 0)
    pairs = pairs.cast(PAIRS)
    return pairs.to_pylist(), sample_report(counts)


def test_strict_preset_makes_pairs_from_json(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("BBA", "en")], cn=[record("CB-", "cn")], fr=[record("CC0", "fr")])
    chunks, skipped = import_recorded(path, work=tmp_path)
    pairs, report = pairs_of(chunks)
    assert skipped == []
    assert {(p["language"], p["rejected_answer"], p["chosen_answer"]) for p in pairs} == set()
    assert report["tied"] == 1.0  # B and C have three votes each
    pairs, report = pairs_of(chunks, Preferences(ties="smallest"))
    found = sorted((p["language"], p["rejected_answer"]) for p in pairs)
    assert found == [("en", "A"), ("fr", "C"), ("fr", "C"), ("zh", "C")]
    by_language = {pair["language"]: pair for pair in pairs}
    assert by_language["zh"]["chosen"] == "x\n答案: B"  # its own text, since it has a winner
    assert by_language["fr"]["chosen"] == "Explication : x\nRéponse : B. fr option B"
    assert by_language["fr"]["prompt"] == record("", "fr")["input"]
    assert report["unparseable_samples"] == pytest.approx(2 / 9)
    # A language's answer is its first completion.
    assert report["accuracy_by_language"] == {"zh": 0.0, "en": 1.0, "fr": 0.0}
    assert report["vote_accuracy"] == 1.0


def test_tie_is_wrong_if_strict_and_goes_to_the_first_if_released(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("BBB", "en", gold="C")], cn=[record("CCC", "cn", gold="C")])
    chunks, _ = import_recorded(path, work=tmp_path)
    _, strict = pairs_of(chunks)
    assert (strict["vote_accuracy"], strict["consistency"]) == (0.0, 0.0)
    chunks, _ = import_recorded(path, work=tmp_path, own_codes=True)
    pairs, released = pairs_of(chunks, Preferences(preset="released"))
    assert released["vote_accuracy"] == 1.0  # Chinese comes before English
    # English is judged alone and always answers B.
    assert pairs == []


def test_released_preset_extracts_its_way_and_keeps_language_codes(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("-BB", "en")], cn=[record("CBC", "cn"), record("-AA", "cn")][:1])
    chunks, _ = import_recorded(path, work=tmp_path, own_codes=True)
    pairs, report = pairs_of(chunks, Preferences(preset="released"))
    assert report["accuracy_by_language"] == {"cn": 0.0, "en": 1.0}  # the first parseable one
    assert [(p["language"], p["rejected_answer"], p["chosen_language"]) for p in pairs] == [("cn", "C", "en")] * 2
    assert pairs[0]["prompt"] == f"问题:{record('', 'cn')['input']}\n"
    assert pairs[0]["chosen"] == "解释: x\n答案:B. cn option B"


def test_released_consistency_skips_partly_answered_questions(tmp_path: Path) -> None:
    rows = {"en": [record("A", "en"), record("B", "en")], "fr": [record("-", "fr"), record("B", "fr")]}
    chunks, _ = import_recorded(write_records(tmp_path, **rows), work=tmp_path)
    assert pairs_of(chunks)[1]["consistency"] == 0.5
    assert pairs_of(chunks, Preferences(preset="released"))[1]["consistency"] == 1.0


def test_letters_beyond_the_options_do_not_vote(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("EEEB", "en", options=4)], fr=[record("BAEE", "fr", options=4)])
    chunks, _ = import_recorded(path, work=tmp_path)
    for preset in ("strict", "released"):
        _, report = pairs_of(chunks, Preferences(preset=preset))
        assert report["unparseable_samples"] == 5 / 8
        assert report["vote_accuracy"] == 1.0


def test_ten_options_and_many_chunks(tmp_path: Path) -> None:
    count = QUESTIONS_PER_CHUNK + 1
    rows = [record("JJA", "en", gold="J", options=10, number=n) for n in range(count)]
    chunks, _ = import_recorded(write_records(tmp_path, en=rows), work=tmp_path)
    assert list(chunks.chunks) == ["00000", "00001"]
    made = [make_pairs(chunks.read(name), Preferences(), 0)[0].to_pylist() for name in chunks.chunks]
    assert [len(pairs) for pairs in made] == [count - 1, 1]
    assert made[1][0]["chosen_answer"] == "J"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"en": [record("A", "en")], "fr": [record("A", "fr"), record("A", "fr")]},
            "row 2: is missing, but other languages have it",
        ),
        (
            {"en": [record("A", "en", gold="A")], "fr": [record("A", "fr")]},
            "row 1: gold letter differs between languages",
        ),
        (
            {"en": [record("A", "en")], "fr": [record("A", "fr", options=3)]},
            "row 1: number of choices differs between languages",
        ),
        ({"en": [{**record("A", "en"), "pred": "A"}, {**record("A", "en"), "pred": []}]}, "row 2: field 'pred'"),
        ({"en": [{**record("A", "en"), "pred": [1]}]}, "row 1: field 'pred' must be a non-empty list of completions"),
        ({"en": [{**record("A", "en"), "input": "no options"}]}, "row 1: no options found"),
    ],
)
def test_bad_records_are_rejected_or_skipped(tmp_path: Path, rows: dict[str, Any], message: str) -> None:
    path = write_records(tmp_path, **rows)
    with pytest.raises(InputError, match=message):
        import_recorded(path, work=tmp_path)
    good = {code: [record("AB", code, gold="A"), *of_language] for code, of_language in rows.items()}
    chunks, skipped = import_recorded(write_records(tmp_path, **good), work=tmp_path, on_bad_row="skip")
    assert len(skipped) >= 1
    assert chunks.read("00000").asked["question_id"].to_pylist()[0] == "0"


def test_two_files_of_one_language_are_rejected(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("A", "en")])
    (tmp_path / "x_csqa_en_train_mistral_sampled.json").write_text(json.dumps([record("B", "en")]))
    with pytest.raises(InputError, match=r"are both en; give one file per language"):
        import_recorded(path, work=tmp_path)
    chunks, _ = import_recorded(f"{path}/*_mistral_sampled.json", work=tmp_path)
    assert chunks.read("00000").completions["text"].to_pylist() == ["x\nAnswer: B"]


def test_parquet_with_a_questions_file(tmp_path: Path) -> None:
    rows = completions({"en": "BBA", "fr": "AB-"}, "q1") + completions({"fr": "CCC", "en": "CDC"}, "q2")
    for row in rows:
        row["text"] = f"{'Answer' if row['language'] == 'en' else 'Réponse'}: {row['answer']}" if row["answer"] else "?"
    pq.write_table(table(Completion, rows[::-1]), tmp_path / "mine.parquet")
    asked = [question(q, code, gold="B") for q in ("q1", "q2") for code in ("en", "fr")]
    pq.write_table(table(Question, asked), tmp_path / "questions.parquet")
    source = str(tmp_path / "mine.parquet")
    chunks, _ = import_recorded(source, work=tmp_path, questions=str(tmp_path / "questions.parquet"))
    pairs, report = pairs_of(chunks)
    found = sorted((p["question_id"], p["language"], p["chosen_answer"], p["rejected_answer"]) for p in pairs)
    assert found == [("q1", "en", "B", "A"), ("q1", "fr", "B", "A"), ("q2", "en", "C", "D")]
    assert report["vote_accuracy"] == 0.5
    assert pairs[0]["prompt"].startswith("Question q1?\nA. en choice 0")
    # Without their questions there are no prompts and no gold, but the same votes.
    chunks, _ = import_recorded(source, work=tmp_path / "again")
    bare, report = pairs_of(chunks)
    same = ("question_id", "language", "rejected", "chosen_answer", "rejected_answer")
    assert {tuple(pair[name] for name in same) for pair in pairs} == {tuple(p[name] for name in same) for p in bare}
    assert {pair["prompt"] for pair in bare} == {None}
    assert report["vote_accuracy"] is None


def test_bad_completion_sources_are_rejected(tmp_path: Path) -> None:
    rows = completions({"en": "BBA", "fr": "AB-"}, "q1")
    pq.write_table(table(Completion, rows).drop_columns("text"), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match=r"mine\.parquet: field 'text' is missing"):
        import_recorded(str(tmp_path / "mine.parquet"), work=tmp_path)
    pq.write_table(table(Completion, rows), tmp_path / "mine.parquet")
    pq.write_table(table(Question, [question("q9", code) for code in ("en", "fr")]), tmp_path / "questions.parquet")
    with pytest.raises(InputError, match=r"mine\.parquet, row 1: question q1 in en is not in --questions"):
        import_recorded(str(tmp_path / "mine.parquet"), work=tmp_path, questions=str(tmp_path / "questions.parquet"))
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as a Parquet file of completions"):
        import_recorded(str(tmp_path / "mine.parquet"), work=tmp_path)
    with pytest.raises(InputError, match=r"none\.json: no question files found"):
        import_recorded(str(tmp_path / "none.json"), work=tmp_path)


def test_samples_of_a_run_are_read_in_place(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), "mine")
    asked = [question("q1", code, gold="B") for code in ("en", "fr")]
    run.questions("align").write("00000", table(Question, asked))
    sample = run.stage(1, "sample")
    rows = completions({"en": "BBA", "fr": "AB-"})
    for row in rows:
        row["text"] = f"{'Answer' if row['language'] == 'en' else 'Réponse'}: {row['answer']}" if row["answer"] else "?"
    for code in ("en", "fr"):
        sample.write(f"00000-{code}", table(Completion, [row for row in rows if row["language"] == code]))
    with pytest.raises(InputError, match="sampling is not finished"):
        import_recorded(sample.storage.uri(), work=tmp_path)
    sample.finish({})
    chunks, _ = import_recorded(sample.storage.uri(), work=tmp_path)
    assert chunks.chunks == {"00000": ["00000-en", "00000-fr"]}
    pairs, _ = pairs_of(chunks)
    assert [(p["language"], p["rejected_answer"]) for p in pairs] == [("en", "A"), ("fr", "A")]
    assert not (tmp_path / "work").exists()


def test_chunked_columns_give_the_same_pairs(tmp_path: Path) -> None:
    chunks, _ = import_recorded(
        write_records(tmp_path, en=[record("BBA", "en")], fr=[record("AB-", "fr")]), work=tmp_path
    )
    whole = chunks.read("00000")
    chunked = type(whole)(
        *(pa.concat_tables([part.slice(0, 1), part.slice(1)]) for part in (whole.asked, whole.completions))
    )
    for mine, other in zip(make_pairs(chunked, Preferences(), 0), make_pairs(whole, Preferences(), 0), strict=True):
        assert mine == other


def test_consistency_is_null_if_no_question_is_fully_answered(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("BBA", "en")], fr=[record("-00", "fr")])
    chunks, _ = import_recorded(path, work=tmp_path)
    pairs, report = pairs_of(chunks, Preferences(preset="released"))
    assert [(pair["language"], pair["rejected_answer"]) for pair in pairs] == [("en", "A")]
    assert (report["consistency"], report["ac3"]) == (None, None)


def test_empty_lines_do_not_shift_questions(tmp_path: Path) -> None:
    for language, gap in (("en", ""), ("fr", "\n\n")):
        rows = [json.dumps(record("AB", language, gold=gold, number=n)) for n, gold in enumerate("ABA")]
        (tmp_path / f"mine_{language}.jsonl").write_text(f"{rows[0]}\n{gap}{rows[1]}\n{rows[2]}\n")
    chunks, skipped = import_recorded(str(tmp_path), work=tmp_path)
    assert skipped == []
    asked = chunks.read("00000").asked.to_pylist()
    assert [(row["question_id"], row["language"], row["gold"]) for row in asked] == [
        (str(n), language, gold) for n, gold in enumerate("ABA") for language in ("en", "fr")
    ]


def test_language_without_a_question_is_not_counted_as_wrong(tmp_path: Path) -> None:
    rows = completions({"en": "BB", "fr": "BB"}, "q1") + completions({"en": "BB"}, "q2")
    pq.write_table(table(Completion, rows), tmp_path / "mine.parquet")
    for row in rows:
        row["text"] = f"{'Answer' if row['language'] == 'en' else 'Réponse'}: B"
    pq.write_table(table(Completion, rows), tmp_path / "mine.parquet")
    asked = [question("q1", "en", gold="B"), question("q1", "fr", gold="B"), question("q2", "en", gold="B")]
    run = RunDirectory(str(tmp_path), "mine")
    run.questions("align").write("00000", table(Question, asked))
    for code in ("en", "fr"):
        of_language = [row for row in rows if row["language"] == code]
        run.stage(1, "sample").write(f"00000-{code}", table(Completion, of_language))
    run.stage(1, "sample").finish({})
    chunks, _ = import_recorded(run.stage(1, "sample").storage.uri(), work=tmp_path)
    _, report = pairs_of(chunks)
    assert report["accuracy_by_language"] == report["own_vote_accuracy"] == {"en": 1.0, "fr": 1.0}
    assert report["consistency"] == 1.0


def test_parquet_accepts_language_aliases_but_no_duplicates(tmp_path: Path) -> None:
    rows = completions({"en": "BBA", "cn": "BAA"})
    for row in rows:
        row["text"] = f"{'Answer' if row['language'] == 'en' else '答案'}: {row['answer']}"
    pq.write_table(table(Completion, rows), tmp_path / "mine.parquet")
    asked = [question("q1", code, gold="A") for code in ("en", "zh")]
    pq.write_table(table(Question, asked), tmp_path / "questions.parquet")
    source, questions = str(tmp_path / "mine.parquet"), str(tmp_path / "questions.parquet")
    for own_codes, name in ((False, "zh"), (True, "cn")):
        chunks, _ = import_recorded(source, work=tmp_path, questions=questions, own_codes=own_codes)
        _, report = pairs_of(chunks, Preferences(ties="smallest"))
        assert report["accuracy_by_language"] == {"en": 0.0, name: 0.0}
        assert report["vote_accuracy"] == 1.0
    pq.write_table(table(Completion, rows[:2]), tmp_path / "more.parquet")
    with pytest.raises(InputError, match="question_id q1, language en, sample 0 appears twice"):
        import_recorded(source, str(tmp_path / "more.parquet"), work=tmp_path)
    (tmp_path / "x_en.json").write_text(json.dumps([record("A", "en")]))
    with pytest.raises(InputError, match=r"x_en\.json: no Parquet files found, unlike in the other sources"):
        import_recorded(source, str(tmp_path / "x_en.json"), work=tmp_path)
    rows[3]["language"] = "tlh"
    pq.write_table(table(Completion, rows), tmp_path / "mine.parquet")
    with pytest.raises(InputError, match=r"mine\.parquet, row 4: 'tlh' is not a known language"):
        import_recorded(source, work=tmp_path)


def test_empty_files_and_lone_surrogates_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x_en.json").write_text("[]")
    with pytest.raises(InputError, match=r"x_en\.json: contains no completions"):
        import_recorded(str(tmp_path / "x_en.json"), work=tmp_path)
    (tmp_path / "x_en.json").write_text(json.dumps([{**record("A", "en"), "pred": ["\ud83d Answer: A"]}]))
    with pytest.raises(InputError, match=r"row 1: contains a lone surrogate"):
        import_recorded(str(tmp_path / "x_en.json"), work=tmp_path)


def test_word_common_to_all_file_names_is_not_a_language(tmp_path: Path) -> None:
    for language in ("en", "fr", "it"):
        (tmp_path / f"x_{language}_gemma-2-9b-it_sampled.json").write_text(json.dumps([record("A", "en")]))
    chunks, _ = import_recorded(str(tmp_path), work=tmp_path)
    assert sorted(chunks.read("00000").asked["language"].to_pylist()) == ["en", "fr", "it"]


def test_gold_answers_do_not_change_pairs(tmp_path: Path) -> None:
    made = []
    for gold in ("A", "D"):
        path = write_records(tmp_path, en=[record("BBA", "en", gold=gold)], fr=[record("CAB", "fr", gold=gold)])
        chunks, _ = import_recorded(path, work=tmp_path / gold)
        made.append([pairs_of(chunks, Preferences(preset=preset))[0] for preset in ("strict", "released")])
    assert made[0] == made[1]
    assert made[0][0]


def test_repairs_are_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path, en=[record("A", "en", gold="Bird")])
    imported = open_completions(
        [path], Stage(Storage(str(tmp_path / "work"))), questions=None, on_bad_row="refuse", own_codes=False
    )
    assert imported.repaired == {"the gold answer is missing or matches no option; kept without a gold answer": 1}
