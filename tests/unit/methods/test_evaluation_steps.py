"""Comparing two policies' answers, read from the files of a stage."""

from pathlib import Path

from factories import scored_tables

from calm_ray.core.rows import Prediction, table
from calm_ray.evaluation.from_scores import changed_answers, most_likely_answers
from calm_ray.methods.shared.evaluation import GeneratedAnswers
from calm_ray.recipes.load import load_config
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def scored_stage(folder: Path, logps: dict[str, list[list[float]]]) -> Stage:
    """A stage of scored candidates in chunks of two questions."""
    stage = Stage(Storage(str(folder)))
    for code, own in scored_tables(logps).items():
        for chunk, start in (("00000", 0), ("00001", 2)):
            stage.write(f"{chunk}-{code}", own.slice(start, 2))
    return stage


def test_changed_answers_are_counted_in_each_language(tmp_path: Path) -> None:
    low, high = [-2.0, -1.0], [-1.0, -2.0]
    before = most_likely_answers(scored_stage(tmp_path / "0", {"en": [high, high, low], "zh": [low, low, low]}), "sum")
    now = most_likely_answers(scored_stage(tmp_path / "1", {"en": [low, high, low], "zh": [high, low, high]}), "sum")
    assert now["en", "q0"] == "B"
    assert now["zh", "q2"] == "A"
    assert len(now) == 6
    assert changed_answers(now, before) == {"en": 1 / 3, "zh": 2 / 3}
    assert changed_answers(now, now) == {"en": 0.0, "zh": 0.0}


def test_changed_generated_answers_are_counted(tmp_path: Path) -> None:
    def generated(name: str, answers: str) -> Stage:
        stage = Stage(Storage(str(tmp_path / name)))
        rows = [
            Prediction(question_id=f"q{i}", language="en", answer=None if one == "-" else one, text="", policy="base")
            for i, one in enumerate(answers)
        ]
        stage.write("00000-en", table(Prediction, rows))
        return stage

    answers_of = GeneratedAnswers(load_config()).answers
    before, now = (answers_of(generated(name, answers)) for name, answers in (("0", "AB-C"), ("1", "ABB-")))
    assert changed_answers(now, before) == {"en": 0.5}
    nothing = Stage(Storage(str(tmp_path / "empty")))
    assert answers_of(nothing) == most_likely_answers(nothing, "sum") == {}
