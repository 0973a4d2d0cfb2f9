"""Selecting questions by subject, for training and for evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import question

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.job.preflight import _read_questions
from calm_ray.questions.subjects import select_subjects
from calm_ray.recipes.load import load_config

SUBJECTS = {"q1": "law", "q2": "law", "q3": "music", "q4": "maths"}
QUESTIONS = [
    Question(**{**question(number, code, gold="B"), "subject": subject})
    for number, subject in SUBJECTS.items()
    for code in ("en", "fr")
]


def test_questions_are_selected_by_subject() -> None:
    assert select_subjects(QUESTIONS, ["maths", "law"], "f") == QUESTIONS[:4] + QUESTIONS[6:]
    in_french = [Question(**{**row, "subject": "droit"}) if row["language"] == "fr" else row for row in QUESTIONS[:2]]
    for name in ("law", "droit"):
        assert select_subjects(in_french, [name], "f") == in_french
    with pytest.raises(InputError, match=r"^f: no question has the subject 'lore'; there are law, maths, music$"):
        select_subjects(QUESTIONS, ["law", "lore"], "f")
    with pytest.raises(InputError, match="'law'; there are no subjects"):
        select_subjects([question()], ["law"], "f")
    many = [Question(**{**question(f"q{i}"), "subject": f"s{i:02}"}) for i in range(63)]
    with pytest.raises(InputError, match=r"s59 and 3 more$"):
        select_subjects(many, ["law"], "f")


def write_jsonl(path: Path, rows: list[Question] = QUESTIONS) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def selected_ids(folder: Path, **questions: Any) -> tuple[set[str], set[str]]:
    """Ids of the questions that a run with this recipe trains on, and of those held out."""
    recipe = folder / "recipe.json"
    settings = {
        "name": "subjects", "model": "some/model", "languages": ["en", "fr"], "engines": {"shared": 1},
        "questions": questions,
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    parts = _read_questions(load_config(recipe), folder, needs_gold=False)
    align, evaluate = ({row["question_id"] for row in part.questions} for part in parts)
    return align, evaluate


def test_subjects_separate_training_from_held_out_questions(tmp_path: Path) -> None:
    file, other = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl")
    same = {"align": file, "evaluate": file}
    found = selected_ids(tmp_path, **same, align_subjects=["law"], evaluate_subjects=["music", "maths"])
    assert found == ({"q1", "q2"}, {"q3", "q4"})
    assert selected_ids(tmp_path, align=file, align_subjects=["music"]) == ({"q3"}, set())
    assert selected_ids(tmp_path, align=file, evaluate=other, evaluate_subjects=["law"]) == (
        set(SUBJECTS), {"q1", "q2"},
    )  # fmt: skip
    train, held_out = selected_ids(tmp_path, align=file, align_subjects=["law"], split={"train": 1})
    assert train | held_out == {"q1", "q2"}
    assert len(train) == 1


@pytest.mark.parametrize(
    ("has_evaluate", "subjects", "message"),
    [
        (True, {"align_subjects": ["lore"]}, "questions.align_subjects: no question has the subject 'lore'"),
        (True, {"evaluate_subjects": ["lore"]}, "questions.evaluate_subjects: no question has the subject 'lore'"),
        (True, {"evaluate_subjects": ["lore"]}, "; there are law, maths, music"),
        (
            True,
            {"align_subjects": ["law", "music"], "evaluate_subjects": ["music"]},
            "1 of its questions are also trained",
        ),
        (True, {}, "questions.evaluate: 4 of its questions are also trained on, such as 'q1'"),
        (False, {"evaluate_subjects": ["law"]}, "evaluate_subjects: filters the questions of evaluate"),
        (False, {"align_subjects": []}, "questions.align_subjects: List should have at least 1 item"),
    ],
)
def test_invalid_subject_settings_are_refused(
    tmp_path: Path, has_evaluate: bool, subjects: dict[str, list[str]], message: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError) as refused:
        selected_ids(tmp_path, align=file, evaluate=file if has_evaluate else None, **subjects)
    assert message in str(refused.value)
