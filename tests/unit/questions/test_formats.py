"""Published formats: hand-written rows, and the real files where available."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import read_questions

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.languages import LANGUAGES
from calm_ray.core.rows import Question
from calm_ray.questions.formats import FORMATS
from calm_ray.questions.reader import load_questions, read
from calm_ray.questions.sources import open_source
from calm_ray.questions.survey import survey
from calm_ray.questions.xcopa_phrases import XCOPA_PHRASES


def write_file(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def write_jsonl(path: Path, *rows: Any) -> str:
    return write_file(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def read_one(source: str, **options: Any) -> tuple[Question, list[str]]:
    """The only question of a source, and its notes."""
    (row,) = read(source, **options)
    return row.question, list(row.notes)


def bad_row_reason(source: str) -> str:
    (row,) = read(source)
    assert isinstance(row.found, BadRow)
    return str(row.found)


XCSQA = {
    "id": "b8", "lang": "jap", "answerKey": "B",
    "question": {"stem": "何？", "choices": [{"label": "A", "text": "猫"}, {"label": "B", "text": "犬"}]},
}  # fmt: skip
XCSQA_HUB = {**XCSQA, "question": {"stem": "何？", "choices": {"label": ["A", "B"], "text": ["猫", "犬"]}}}


def test_xcsqa_rows(tmp_path: Path) -> None:
    expected = Question(
        question_id="b8", language="ja", text="何？", choices=["猫", "犬"], gold="B", subject=None
    )  # fmt: skip
    assert read_one(write_jsonl(tmp_path / "a.jsonl", XCSQA)) == (expected, [])
    pq.write_table(pa.Table.from_pylist([XCSQA_HUB]), tmp_path / "b.parquet")
    assert read_one(str(tmp_path / "b.parquet")) == (expected, [])
    test_split = {key: value for key, value in XCSQA.items() if key != "answerKey"}
    assert read_one(write_jsonl(tmp_path / "a.jsonl", test_split))[0]["gold"] is None
    assert read_one(write_jsonl(tmp_path / "a.jsonl", {**XCSQA, "answerKey": ""}))[0]["gold"] is None
    assert bad_row_reason(write_jsonl(tmp_path / "a.jsonl", {**XCSQA, "answerKey": "C"})) == (
        "the gold answer is not one of the choices: 'C'; choices are A, B"
    )
    assert "must hold a stem" in bad_row_reason(write_jsonl(tmp_path / "a.jsonl", {**XCSQA, "question": "何？"}))


@pytest.mark.parametrize(
    ("raw", "text", "last", "repaired"),
    [
        ("Q?\nA. a\nB. b", "Q?", "b", False),
        ("Question: Q?\nA. a\nB. b\nAnswer:", "Q?", "b", False),
        ("Frage:Frage: Q?\nA. a\nB. b\nAnswer:\nAntwort:\nAntwort:", "Q?", "b", False),
        ("Question:Q ?\nA. a\nB. b\nRéponse :", "Q ?", "b", False),
        ("質問: Q？\nA. a\nB. b\n答え:", "Q？", "b", False),
        ("问题:Q？\nA. a\nB. b\n\n答案:", "Q？", "b", False),
        ("Q (N = 4)\nof two. (A) a (x) (B) b (C) ", "Q (N = 4)\nof two.", None, False),
        ("Q（　　）。 (A) a (B) b ", "Q（　　）。", "b", False),
        ("Q? A. no\n(A) a\n(B) b, vitamin (A)\n", "Q? A. no", "b, vitamin (A)", False),
        ("Q: (A) or (B)?\n(A) a\n(B) b\n(C) c", "Q: (A) or (B)?", "c", False),
        ("Q?\n(a) a\n(B) b", "Q?", "b", True),
        ("Q?\n（一）a\n(B) b\n”", "Q?", "b", True),
        ("Q?\n(A) a\n(二)b", "Q?", "b", True),
    ],
)
def test_calm_inputs_are_split_into_text_and_choices(
    tmp_path: Path, raw: str, text: str, last: str | None, repaired: bool
) -> None:
    path = write_file(tmp_path / "x_en.json", json.dumps([{"instruction": "", "input": raw, "output": "A"}]))
    if last is None:
        assert bad_row_reason(path) == "a choice is empty: C"
        return
    question, notes = read_one(path)
    assert (question["text"], question["choices"][0][0], question["choices"][-1]) == (text, "a", last)
    assert bool(notes) is repaired


@pytest.mark.parametrize(
    ("output", "gold", "note"),
    [
        ("B", "B", ""),
        ("(B) dog", "B", ""),
        ("(B)dog", "B", ""),
        ("B. dog", "B", ""),
        ("(b) dog", "B", "lowercase"),
        ("（B）dog", "B", "full-width"),
        ("（二）dog", "B", "full-width"),
        ("(二) dog", "B", "Chinese numeral"),
        ("dog", "B", "matches one option"),
        ("Bird", None, "kept without a gold answer"),
        ("", None, "kept without a gold answer"),
    ],
)
def test_calm_gold_answers_are_normalized(tmp_path: Path, output: str, gold: str | None, note: str) -> None:
    row = {"instruction": "", "input": "Q?\n(A) cat\n(B) dog", "output": output, "pred": []}
    question, notes = read_one(write_file(tmp_path / "x_en.json", json.dumps([row])))
    assert question["gold"] == gold
    assert (note in notes[0]) if note else not notes


def test_calm_input_without_options_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"instruction": "", "input": "Q?", "output": "A"}]
    assert bad_row_reason(write_file(tmp_path / "x_en.json", json.dumps(rows))).startswith("no options found")


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("x_csqa_cn_train.json", "zh"),
        ("x_csqa_en_train_sampled.json", "en"),
        ("x_csqa_de_train_mistral_sampled.json", "de"),
        ("x_csqa_ja_test.json", "ja"),
        ("all_test_native_en.json", "en"),
        ("all_test_en2fr.json", "fr"),
        ("testset_native_cn.json", "zh"),
        ("testset_cn2en.json", "en"),
        ("all_test_cn2fr.json", "fr"),
        ("mmlu_FR-FR.json", "fr"),
        ("mmlu_ZH-CN.json", "zh"),
        ("mmlu_AR-XY.json", "ar"),
        ("mmlu_FR-CA.json", "fr"),
        ("KO_KR/test.json", "ko"),
        ("X-CSQA-fr.json", "fr"),
        ("val.it.json", "it"),
        ("sw/test-00000-of-00001.json", "sw"),
        ("fr/deeper/x_en.json", "en"),
        ("fr/deeper/x.json", "fr"),
    ],
)
def test_language_is_inferred_from_the_path(tmp_path: Path, name: str, language: str) -> None:
    rows = [{"instruction": "", "input": "Q?\nA. a\nB. b", "output": "A"}]
    (part,) = open_source(write_file(tmp_path / "plain" / name, json.dumps(rows)))
    assert part.language == language


def test_name_with_no_or_two_languages_is_refused(tmp_path: Path) -> None:
    rows = json.dumps([{"instruction": "", "input": "Q?\nA. a\nB. b", "output": "A"}])
    path = write_file(tmp_path / "plain" / "plain" / "x.json", rows)
    with pytest.raises(InputError, match="a known language; set `language`"):
        open_source(path)
    assert read_one(path, language="cn")[0]["language"] == "zh"
    for name in ("x_en_fr", "en-fr"):
        with pytest.raises(InputError, match="names the languages en and fr; set `language`"):
            open_source(write_file(tmp_path / f"{name}.json", rows))


def test_medqa_rows(tmp_path: Path) -> None:
    row = {
        "question": "Q?", "answer": "Nitrofurantoin", "options": {"B": "b", "A": "Ampicillin", "C": "c", "D": "n"},
        "meta_info": "step2&3", "answer_idx": "D", "metamap_phrases": ["woman"],
    }  # fmt: skip
    question, _ = read_one(write_jsonl(tmp_path / "US" / "4_options" / "phrases_no_exclude_test.jsonl", row))
    assert question == Question(
        question_id="en-0", language="en", text="Q?", choices=["Ampicillin", "b", "c", "n"], gold="D", subject="step2&3"
    )  # fmt: skip
    chinese = write_jsonl(tmp_path / "Mainland" / "4_options" / "test.jsonl", row, {**row, "answer_idx": "E"})
    good, other = read(chinese)
    assert (good.question["question_id"], good.question["language"]) == ("zh-0", "zh")
    assert str(other.found) == "the gold answer is not one of the choices: 'E'; choices are A, B, C, D"
    both = survey(f"{tmp_path}/**/*.jsonl")
    assert {code: count.missing for code, count in both.languages.items()} == {"zh": 0, "en": 0}


def test_mmmlu_rows(tmp_path: Path) -> None:
    header, row = ",Question,A,B,C,D,Answer,Subject", '7,"Q, ""x"" ?\nEncore",un,deux,trois,"1, 2",D,anatomy'
    expected = Question(
        question_id="7", language="fr", text='Q, "x" ?\nEncore', choices=["un", "deux", "trois", "1, 2"], gold="D",
        subject="anatomy",
    )  # fmt: skip
    assert read_one(write_file(tmp_path / "mmlu_FR-FR.csv", f"{header}\n{row}\n")) == (expected, [])
    columns = {"Unnamed: 0": 7, "Question": expected["text"], "Answer": "D", "Subject": "anatomy"}
    columns |= dict(zip("ABCD", expected["choices"], strict=True))
    (tmp_path / "FR_FR").mkdir()
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "FR_FR" / "test.parquet")
    assert read_one(str(tmp_path / "FR_FR" / "test.parquet")) == (expected, [])
    write_file(tmp_path / "x" / "mmlu_DE-DE.csv", f"{header[1:]}\nQ,a,b,c,,d,s\nQ,a,b,c,d,d,s\n")
    empty, lower = read(f"{tmp_path}/x")
    assert str(empty.found) == "field 'D' is missing or empty"
    assert (lower.question["question_id"], lower.question["gold"]) == ("1", "D")
    assert lower.notes == ["the gold letter was lowercase"]


def test_global_mmlu_rows(tmp_path: Path) -> None:
    row = {
        "sample_id": "anatomy/test/3", "subject": "anatomy", "subject_category": "STEM", "question": "Q?",
        "option_a": "a", "option_b": "b", "option_c": "c", "option_d": "d", "answer": "C", "required_knowledge": "[]",
    }  # fmt: skip
    (tmp_path / "sw").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "sw" / "test-00000-of-00001.parquet")
    assert read_one(str(tmp_path / "sw"))[0] == Question(
        question_id="anatomy/test/3", language="sw", text="Q?", choices=list("abcd"), gold="C", subject="anatomy"
    )  # fmt: skip


def test_bmlama_rows(tmp_path: Path) -> None:
    rows = ["<mask> is x.\tRome\tParis, Rome\tItaly", "Of <mask> it.\tOslo\tParis, Rome\tNorway"]
    path = write_file(tmp_path / "he.tsv", "\r\n".join(["Prompt\tAns\tCandidate Ans\tSubject", *rows, ""]))
    first, second = read(path)
    assert first.question == Question(
        question_id="0", language="he", text="<mask> is x.", choices=["Paris", "Rome"], gold="B", subject="Italy"
    )  # fmt: skip
    assert (second.question["question_id"], second.question["gold"]) == ("1", None)
    assert second.notes == ["the gold answer is not among the candidates; kept without a gold answer"]
    broken = write_file(tmp_path / "zh.tsv", "\r\n".join(["Prompt\tAns\tCandidate\tAns\tSubject", *rows, ""]))
    assert [row.question["text"] for row in read(broken)] == ["<mask> is x.", "Of <mask> it."]
    assert survey(broken).repaired["the header had a tab inside a column name"] == 1
    assert read_questions(str(tmp_path), ["he", "zh"], needs_gold=False)[0]["language"] == "he"


def test_xcopa_rows(tmp_path: Path) -> None:
    row = {
        "premise": "L'uomo aprì il rubinetto.", "choice1": "a", "choice2": "b", "question": "effect", "label": 1,
        "idx": 0, "changed": False,
    }  # fmt: skip
    path = tmp_path / "data" / "it" / "val.it.jsonl"
    assert read_one(write_jsonl(path, row))[0] == Question(
        question_id="0", language="it", text="L'uomo aprì il rubinetto.\nChe cosa è successo di conseguenza?",
        choices=["a", "b"], gold="B", subject=None,
    )  # fmt: skip
    assert read_one(write_jsonl(path, {**row, "question": "cause"}))[0]["text"].endswith("Qual è stata la causa?")
    assert bad_row_reason(write_jsonl(path, {**row, "label": 2})) == "field 'label' must be 0, 1, or -1 if unknown: 2"
    assert read_one(write_jsonl(path, {**row, "label": -1}))[0]["gold"] is None
    assert read_one(write_jsonl(path, {**row, "label": 1.0}))[0]["gold"] == "B"
    assert (
        bad_row_reason(write_jsonl(path, {**row, "question": "why"}))
        == "field 'question' must be cause or effect: 'why'"
    )
    assert bad_row_reason(write_jsonl(tmp_path / "val.ru.jsonl", row)).startswith("not a language of XCOPA: 'ru'")


def test_phrases_and_formats_are_complete() -> None:
    assert set(XCOPA_PHRASES) == {"en", *["et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"]}
    assert set(XCOPA_PHRASES) <= set(LANGUAGES)
    assert len({phrase for phrases in XCOPA_PHRASES.values() for phrase in phrases.values()}) == 24
    assert list(FORMATS) == ["questions", "xcsqa", "calm", "medqa", "mmmlu", "global_mmlu", "bmlama", "xcopa"]
    assert all(layout.published for layout in FORMATS.values())


def test_published_bmlama_files(data: Path) -> None:
    """Compares with the same files split by hand."""
    folder = data / "bmlama17"
    found = survey(str(folder))
    assert (found.rows, found.kept, found.refused.total()) == (8 * 6792, 8 * 6792, 0)
    assert found.repaired == {"the header had a tab inside a column name": 1}
    assert set(found.languages) == {"ar", "en", "es", "fr", "ja", "ko", "ru", "zh"}
    questions = read_questions(str(folder), list(found.languages))
    by_language = {code: [row for row in questions if row["language"] == code] for code in found.languages}
    for code, count in found.languages.items():
        lines = (folder / f"{code}.tsv").read_bytes().decode().split("\r\n")[1:-1]
        rows = [line.split("\t") for line in lines]
        sizes = Counter(row[2].count(", ") + 1 for row in rows)
        assert (count.min_choices, count.max_choices) == (min(sizes), max(sizes))
        assert count.questions == count.with_gold == len(rows)
        assert (count.missing, count.duplicates) == (0, len(rows) - len({(row[0], row[2]) for row in rows}))
        for number, (prompt, answer, candidates, subject) in enumerate(rows):
            read_row = by_language[code][number]
            assert (read_row["question_id"], read_row["text"]) == (str(number), prompt)
            assert (", ".join(read_row["choices"]), read_row["subject"]) == (candidates, subject)
            assert read_row["choices"]["ABCDEFGHIJ".index(read_row["gold"] or "")] == answer
    assert sum(row["text"].count("<mask>") for row in questions) == len(questions)


@pytest.mark.parametrize(("folder", "count"), [("samples", 899), ("test", 100)])
def test_published_calm_files(data: Path, folder: str, count: int) -> None:
    languages = ["en", "zh", "fr", "de", "it", "ja"]
    loaded = load_questions(str(data / "calm_xcsqa" / folder), languages, needs_gold=True)
    assert set(loaded.repaired) == {"two choices have the same text; kept"}
    assert len(loaded.questions) == 6 * count
    for row in loaded.questions:
        assert len(row["choices"]) == 5
        for text in (row["text"], *row["choices"]):
            assert not text.endswith((":", "：")), row
            assert "\n" not in text
        assert not row["text"].startswith(("Question:", "Frage:", "Domanda:", "質問:", "问题:")), row
    raw = json.loads(next((data / "calm_xcsqa" / folder).glob("x_csqa_it_*.json")).read_bytes())
    italian = [row for row in loaded.questions if row["language"] == "it"]
    assert [row["gold"] for row in italian] == [row["output"] for row in raw]
    for row, published in zip(italian, raw, strict=True):
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=True)]
        assert "\n".join([f"Domanda: {row['text']}", *lines]) in published["input"]


def test_calm_pair_files_are_not_questions(data: Path) -> None:
    with pytest.raises(InputError, match="closest is calm, which also needs output"):
        survey(str(data / "calm_xcsqa" / "pairs"))
