"""Questions of the atlas: the same in every language, with one right choice, and apart in what is held out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("babel", reason="needs the extra atlas")

from calm_ray.cli import main
from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES
from calm_ray.demo.atlas import questions
from calm_ray.demo.atlas.questions import HELD_OUT_TOPIC, TOPICS, atlas_languages, build_atlas, territories, wording
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.reader import load_questions

CODES = ["en", "fr", "es", "de", "it", "pt"]


def territory_of(question_id: str) -> str:
    return question_id.partition("-")[2]


def test_questions_are_parallel_and_have_one_right_choice() -> None:
    atlas = build_atlas(0, CODES)
    for rows in (atlas.align, atlas.held_out):
        by_id: dict[str, list[str]] = {}
        for row in rows:
            by_id.setdefault(row["question_id"], []).append(row["language"])
            assert len(set(row["choices"])) == 4
        assert set(map(tuple, by_id.values())) == {tuple(CODES)}
    poland = [row for row in atlas.align + atlas.held_out if row["question_id"] == "language-PL"]
    right = {row["language"]: row["choices"][LETTERS.index(str(row["gold"]))] for row in poland}
    assert right == {
        "en": "Polish",
        "fr": "polonais",
        "es": "polaco",
        "de": "Polnisch",
        "it": "polacco",
        "pt": "polonês",
    }
    assert {row["language"]: row["text"] for row in poland}["fr"] == "Pays : Pologne. Quelle est sa langue officielle ?"


def test_territories_and_a_topic_are_held_out() -> None:
    atlas = build_atlas(0, CODES)
    align, held_out = ({territory_of(row["question_id"]) for row in rows} for rows in (atlas.align, atlas.held_out))
    assert not align & held_out
    assert HELD_OUT_TOPIC not in {row["subject"] for row in atlas.align}
    assert {row["subject"] for row in atlas.held_out} == set(TOPICS)
    assert len(atlas.align) // 6 == 156
    assert Counter(row["subject"] for row in atlas.held_out if row["language"] == "en") == {
        "currency": 60, "language": 43, "capital": 50
    }  # fmt: skip


def test_seed_decides_and_nothing_else() -> None:
    assert build_atlas(3, CODES) == build_atlas(3, CODES)
    assert build_atlas(3, ["fr"]).align == [row for row in build_atlas(3, CODES).align if row["language"] == "fr"]
    assert build_atlas(3, ["en"]).align != build_atlas(4, ["en"]).align


def test_every_language_has_every_topic() -> None:
    assert set(wording()) <= set(LANGUAGES)
    assert all(templates.keys() == TOPICS.keys() for templates in wording().values())
    assert all("{territory}" in text for templates in wording().values() for text in templates.values())
    assert not build_atlas(0, atlas_languages()).dropped
    assert all(re.fullmatch("[A-Z]{2}", code) for code in territories())


def test_choices_with_the_same_name_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    one_name = questions.Topic(questions._currencies, lambda locale, code: "peso" if code < "M" else code)
    monkeypatch.setattr(questions, "TOPICS", {"currency": one_name})
    atlas = build_atlas(0, ["en", "es"])
    dropped = atlas.dropped["currency: options with the same name in en"]
    assert dropped > 0
    assert all(row["choices"].count("peso") <= 1 for row in atlas.align)


def test_names_missing_in_a_language_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = questions.Topic(questions._languages, lambda locale, code: None if code == "es" else code)
    monkeypatch.setattr(questions, "TOPICS", {"language": nameless})
    assert build_atlas(0, ["en"]).dropped["language: no name in en"] > 10


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"languages: the atlas has en, fr, .*, but not ru"):
        build_atlas(0, ["en", "ru"])
    few = questions.Topic(lambda territory: ["euro"], lambda locale, code: code)
    monkeypatch.setattr(questions, "TOPICS", {"currency": few})
    with pytest.raises(InputError, match="only 1 values of currency, but a question needs 4"):
        build_atlas(0, ["en"])


def test_command_writes_question_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "atlas"
    assert main(["atlas", "--out", str(out), "--languages", "en", "de"]) == 0
    assert "156 questions in 2 languages" in capsys.readouterr().out
    taken = load_questions(str(out / "align.jsonl"), ["en", "de"], needs_gold=True)
    assert taken.questions == build_atlas(0, ["en", "de"]).align
    assert json.loads((out / "held_out.jsonl").read_text().splitlines()[0])["language"] == "en"
    assert "CC BY 4.0" in (out / "LICENSE.txt").read_text()
    assert main(["atlas", "--out", str(out)]) == 2
