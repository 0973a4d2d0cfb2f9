"""Questions of some subjects, chosen for training and for what is held out."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import question

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.job.preflight import _read_questions
from calm_ray.questions.subjects import of_subjects
from calm_ray.recipes import load_config

SUBJECTS = {"q1": "law", "q2": "law", "q3": "music", "q4": "maths"}
QUESTIONS = [
    Question(**{**question(number, code, gold="B"), "subject": subject})
    for number, subject in SUBJECTS.items()
    for code in ("en", "fr")
]


def test_questions_of_some_subjects() -> None:
    assert of_subjects(QUESTIONS, ["maths", "law"], "f") == QUESTIONS[:4] + QUESTIONS[6:]
    in_french = [Question(**{**row, "subject": "droit"}) if row["language"] == "fr" else row for row in QUESTIONS[:2]]
    for name in ("law", "droit"):
        assert of_subjects(in_french, [name], "f") == in_french
    with pytest.raises(InputError, match=r"^f: no question is of the subject 'lore'; there are law, maths, music$"):
        of_subjects(QUESTIONS, ["law", "lore"], "f")
    with pytest.raises(InputError, match="'law'; there are no subjects"):
        of_subjects([question()], ["law"], "f")
    many = [Question(**{**question(f"q{i}"), "subject": f"s{i:02}"}) for i in range(63)]
    with pytest.raises(InputError, match=r"s59 and 3 more$"):
        of_subjects(many, ["law"], "f")


def jsonl(path: Path, rows: list[Question] = QUESTIONS) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def taken(folder: Path, **questions: Any) -> tuple[set[str], set[str]]:
    """The ids of the questions that a run of such a recipe trains on, and of those held out."""
    recipe = folder / "recipe.json"
    settings = {
        "name": "subjects", "model": "some/model", "languages": ["en", "fr"], "engines": {"shared": 1},
        "questions": questions,
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    parts = _read_questions(load_config(recipe), folder, needs_gold=False)
    align, evaluate = ({row["question_id"] for row in part.questions} for part in parts)
    return align, evaluate


def test_subjects_part_what_is_trained_on_from_what_is_held_out(tmp_path: Path) -> None:
    file, other = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl")
    same = {"align": file, "evaluate": file}
    found = taken(tmp_path, **same, align_subjects=["law"], evaluate_subjects=["music", "maths"])
    assert found == ({"q1", "q2"}, {"q3", "q4"})
    assert taken(tmp_path, align=file, align_subjects=["music"]) == ({"q3"}, set())
    assert taken(tmp_path, align=file, evaluate=other, evaluate_subjects=["law"]) == (
        set(SUBJECTS), {"q1", "q2"},
    )  # fmt: skip
    train, held_out = taken(tmp_path, align=file, align_subjects=["law"], split={"train": 1})
    assert train | held_out == {"q1", "q2"}
    assert len(train) == 1


@pytest.mark.parametrize(
    ("has_evaluate", "subjects", "message"),
    [
        (True, {"align_subjects": ["lore"]}, "questions.align_subjects: no question is of the subject 'lore'"),
        (True, {"evaluate_subjects": ["lore"]}, "questions.evaluate_subjects: no question is of the subject 'lore'"),
        (True, {"evaluate_subjects": ["lore"]}, "; there are law, maths, music"),
        (True, {"align_subjects": ["law", "music"], "evaluate_subjects": ["music"]}, "1 of its questions are trained"),
        (True, {}, "questions.evaluate: 4 of its questions are trained on, too, 'q1' for one"),
        (False, {"evaluate_subjects": ["law"]}, "evaluate_subjects: chooses among the questions of evaluate"),
        (False, {"align_subjects": []}, "questions.align_subjects: List should have at least 1 item"),
    ],
)
def test_what_is_refused(tmp_path: Path, has_evaluate: bool, subjects: dict[str, list[str]], message: str) -> None:
    file = jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError) as refused:
        taken(tmp_path, align=file, evaluate=file if has_evaluate else None, **subjects)
    assert message in str(refused.value)
