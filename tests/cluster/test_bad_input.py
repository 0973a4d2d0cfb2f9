"""Bad input is refused before any engine starts: exit code 2, and a message that names what is wrong and what to do."""

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
from calm_ray.recipes import load_config
from calm_ray.testing import word_tokenizer, write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_8_cpus")


@pytest.fixture
def refused(make_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the recipe with overrides that must be refused; returns the message."""

    def run(*overrides: str, code: int = 2, **changes: Any) -> str:
        recipe = make_recipe(name="bad", storage=str(tmp_path / "runs"), **changes)
        assert main(["align", str(recipe), *overrides]) == code
        assert not list((tmp_path / "runs").glob("**/*.parquet"))
        return capsys.readouterr().err

    return run


def test_unknown_keys_and_wrong_types_are_named(refused: Callable[..., str]) -> None:
    assert "train.learning_rat" in (message := refused("train.learning_rat=1e-5"))
    assert "did you mean learning_rate" in message
    assert "rounds: must be 1 or more" in refused("rounds=0")
    assert "rounds: " in (message := refused("rounds=-1"))
    assert "it is -1" in message
    assert "train.epochs" in refused("train.epochs=many")


def test_a_model_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'nowhere'}" in refused(model=str(tmp_path / "nowhere"))


def test_a_folder_that_holds_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "safetensors" in refused(model=str(tmp_path / "empty"))


def test_a_tokenizer_without_the_letters(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", word_tokenizer(["Answer:", "B", "C"]))
    message = refused(model=str(folder))
    assert "cannot write the answer letters A, D" in message
    assert str(folder) in message


def test_a_question_without_one_of_the_languages(
    refused: Callable[..., str], question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = read_questions(str(question_files[0]), ["en", "fr"])
    file = tmp_path / "short.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows[:-1]))
    message = refused(questions={"align": str(file)})
    assert str(file) in message
    assert rows[-1]["question_id"] in message
    assert "fr" in message


def test_a_question_with_fewer_choices_in_one_language(
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


def test_more_engines_than_the_cluster_can_ever_place(refused: Callable[..., str]) -> None:
    message = refused("engines.shared=40", code=3)
    assert "CPU (the cluster has at most 8)" in message
    assert "engines.shared" in message


def test_a_model_that_is_neither_here_nor_on_the_hub(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(model="nobody/nothing")
    assert "there is no folder nobody/nothing here" in message
    assert "HF_TOKEN" in message


def test_training_settings_are_tried_before_anything_is_sampled(refused: Callable[..., str]) -> None:
    assert "not_a_module" in refused("train.lora.targets=[not_a_module]")
    assert "beta_typo" in refused("train.engine=trl", "train.trl.beta_typo=1")


def test_a_device_that_vllm_was_not_installed_for(refused: Callable[..., str]) -> None:
    message = refused("device=gpu")
    assert "device=cpu" in message
    assert "make install CUDA=1" in message


def test_a_question_that_does_not_fit_into_the_engines(refused: Callable[..., str]) -> None:
    message = refused("engines.args.max_model_len=16")
    assert "its prompt is" in message
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
        (["dco.anchor={language: en, strength: 2}", "dco.gamma=1.0"], "anchor: sets every gamma itself"),
        (["languages=[en]"], "languages: DCO compares languages and needs two or more"),
        (["candidates.form=world"], "candidates.form: only the demo world can use world"),
        (["init_from=nowhere"], "nowhere: there is no run here"),
    ],
)
def test_settings_of_dco_that_mean_nothing(refused: Callable[..., str], overrides: list[str], message: str) -> None:
    assert message in refused(*overrides, **DCO)


@pytest.fixture
def candidate_file(question_files: tuple[Path, Path], tmp_path: Path) -> Callable[[list[str]], Path]:
    """Questions of which one, in row 4, has other choices; all its languages are changed where their number is."""

    def write(choices: list[str]) -> Path:
        rows = read_questions(str(question_files[0]), ["en", "fr"])
        rows[3]["choices"] = choices
        file = tmp_path / "candidates.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return file

    return write


def test_candidates_that_are_the_same_but_for_spaces(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    file = candidate_file(["wolf", "fox", "owl", " fox"])
    message = refused(questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: two candidates are the same: B and D, 'fox'" in message


def test_candidates_in_numbers_that_differ(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl"])
    message = refused(questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: the languages differ in choices" in message


def test_a_candidate_that_is_nothing_to_the_tokenizer(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    tokenizer = word_tokenizer(["wolf", "fox", "owl"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")  # a soft hyphen, as many drop it
    model = write_tiny_model(tmp_path / "model", tokenizer)
    file = candidate_file(["wolf", "fox", "\u00ad", "owl"])
    message = refused(questions={"align": str(file)}, model=str(model), **DCO)
    assert f"{file}, row 4: a candidate is no token to the model's tokenizer: C, " in message


def test_a_candidate_that_does_not_fit_into_the_engines(
    refused: Callable[..., str], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl " * 200, "eagle"])
    message = refused("engines.args.max_model_len=200", questions={"align": str(file)}, **DCO)
    assert f"{file}, row 4: a candidate does not fit into the engines' context" in message


def test_questions_with_bad_candidates_are_left_out_where_asked(
    make_recipe: Callable[..., Path], candidate_file: Callable[[list[str]], Path]
) -> None:
    file = candidate_file(["wolf", "fox", "owl", "fox "])
    recipe = make_recipe(name="skips", questions={"align": str(file), "on_bad_row": "skip"}, **DCO)
    intake = prepare(load_config(recipe), None).align
    bad = read_questions(str(file), ["en", "fr"])[3]["question_id"]
    assert bad not in {row["question_id"] for row in intake.questions}
    assert len(intake.questions) == 2 * 23
    assert intake.left_out[0].row == 4
    assert "two candidates are the same" in intake.left_out[0].reason
