"""Bad input is refused before any engine starts, with exit code 2 and a message that names the problem and the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import read_questions
from tokenizers import normalizers

from calm_ray.cli import main
from calm_ray.job.preflight import prepare
from calm_ray.recipes.load import load_config
from calm_ray.testing import word_tokenizer, write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_8_cpus")


@pytest.fixture
def refused(make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a recipe that must be refused without writing any rows; returns the error message."""

    def run(*overrides: str, code: int = 2, **changes: Any) -> str:
        recipe = make_recipe(name="bad", storage=str(tmp_path / "runs"), **changes)
        assert main(["align", str(recipe), *overrides]) == code
        assert not list((tmp_path / "runs").glob("**/*.parquet"))
        return capsys.readouterr().err

    return run


def test_unknown_keys_and_wrong_values_are_named(refused: Callable[..., str]) -> None:
    assert "train.learning_rat" in (message := refused("train.learning_rat=1e-5"))
    assert "did you mean learning_rate" in message
    assert "rounds: must be 1 or more" in refused("rounds=0")
    assert "rounds: " in (message := refused("rounds=-1"))
    assert "it is -1" in message
    assert "train.epochs" in refused("train.epochs=many")


def test_missing_model_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'nowhere'}" in refused(model=str(tmp_path / "nowhere"))


def test_model_folder_without_weights(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "safetensors" in refused(model=str(tmp_path / "empty"))


def test_tokenizer_that_cannot_write_the_answer_letters(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", word_tokenizer(["Answer:", "B", "C"]))
    message = refused(model=str(folder))
    assert "cannot write the answer letters A, D" in message
    assert str(folder) in message


def test_question_missing_in_one_language(
    refused: Callable[..., str], question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = read_questions(str(question_files[0]), ["en", "fr"])
    file = tmp_path / "short.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows[:-1]))
    message = refused(questions={"align": str(file)})
    assert str(file) in message
    assert rows[-1]["question_id"] in message
    assert "fr" in message


def test_question_with_fewer_choices_in_one_language(
    refused: Callable[..., str], question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = read_questions(str(question_files[0]), ["en", "fr"])
    rows[3]["choices"] = rows[3]["choices"][:3]
    file = tmp_path / "unequal.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    message = refused(questions={"align": str(file)})
    assert str(file) in message
    assert "4" in message
    assert "3" in message
    assert rows[3]["question_id"] in message


def test_more_engines_than_the_cluster_can_hold(refused: Callable[..., str]) -> None:
    message = refused("engines.shared=40", code=3)
    assert "CPU (the cluster has at most 8)" in message
    assert "engines.shared" in message


def test_model_not_found_locally_or_on_the_hub(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(model="nobody/nothing")
    assert "there is no folder nobody/nothing here" in message
    assert "HF_TOKEN" in message


def test_training_settings_are_checked_before_sampling(refused: Callable[..., str]) -> None:
    assert "not_a_module" in refused("train.lora.targets=[not_a_module]")
    assert "beta_typo" in refused("train.engine=trl", "train.trl.beta_typo=1")


def test_device_that_vllm_is_not_installed_for(refused: Callable[..., str]) -> None:
    message = refused("device=gpu")
    assert "device=cpu" in message
    assert "make install CUDA=1" in message


def test_question_too_long_for_the_engines(refused: Callable[..., str]) -> None:
    message = refused("engines.args.max_model_len=16")
    assert "its prompt has" in message
    assert "engines take 16" in message


DCO = {"method": "dco", "candidates": {"form": "choices"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dco.gamma=0"], "dco.gamma"),
        (["dco.gamma=-1.5"], "dco.gamma"),
        (["dco.gamma={en-fr: 0}"], "dco.gamma"),
        (["dco.gamma={en-de: 1.0}"], "dco.gamma: en-de does not name two of the run's languages"),
        (["dco.gamma={en: 1.0}"], "dco.gamma: en does not name two of the run's languages"),
        (["dco.gamma={en-en: 1.0}"], "dco.gamma: en-en does not name two of the run's languages"),
        (["dco.anchor={language: de, strength: 2}"], "dco.anchor.language: de is not one of the run's languages"),
        (["dco.anchor={language: en, strength: 0}"], "dco.anchor.strength"),
        (["dco.anchor={language: en, strength: 2}", "dco.gamma=1.0"], "anchor: cannot be combined with gamma"),
        (["languages=[en]"], "languages: DCO needs at least two languages"),
        (["candidates.form=world"], "candidates.form: world is only for the demo world"),
        (["init_from=nowhere"], "nowhere: there is no run here"),
    ],
)
def test_invalid_dco_settings(refused: Callable[..., str], overrides: list[str], message: str) -> None:
    assert message in refused(*overrides, **DCO)


@pytest.fixture
def candidate_file(question_files: tuple[Path, Path], tmp_path: Path) -> Callable[[list[str]], Path]:
    """Writes questions with the given choices in row 4. Other languages of that question keep theirs."""

    def write(choices: list[str]) -> Path:
        rows = read_questions(str(question_files[0]), ["en", "fr"])
        rows[3]["choices"] = choices
        file = tmp_path / "candidates.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return file

    return write


def test_candidates_that_differ_only_in_whitespace(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    file = candidate_file(["wolf", "fox", "owl", " fox"])
    message = refused(questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: two candidates are identical: B and D, 'fox'" in message


def test_number_of_candidates_differs_between_languages(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl"])
    message = refused(questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: number of choices differs between languages" in message


def test_candidate_without_tokens(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    tokenizer = word_tokenizer(["wolf", "fox", "owl"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")  # many tokenizers drop soft hyphens
    model = write_tiny_model(tmp_path / "model", tokenizer)
    file = candidate_file(["wolf", "fox", "\u00ad", "owl"])
    message = refused(questions={"align": str(file)}, model=str(model), **DCO)
    assert f"{file}, row 4: a candidate has no tokens in the model's tokenizer: C, " in message


def test_candidate_too_long_for_the_engines(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl " * 200, "eagle"])
    message = refused("engines.args.max_model_len=200", questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: a candidate does not fit into the engines' context" in message


def test_questions_with_bad_candidates_can_be_skipped(
    make_recipe: Callable[..., Path], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl", "fox "])
    recipe = make_recipe(name="skips", questions={"align": str(file), "on_bad_row": "skip"}, **DCO)
    intake = prepare(load_config(recipe), None).align
    bad = read_questions(str(file), ["en", "fr"])[3]["question_id"]
    assert bad not in {row["question_id"] for row in intake.questions}
    assert len(intake.questions) == 2 * 23
    assert intake.skipped[0].row == 4
    assert "two candidates are identical" in intake.skipped[0].reason
