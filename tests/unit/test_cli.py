"""Command-line arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calm_ray.cli import main
from calm_ray.recipes.files import DEMO_RECIPE, RECIPES, name_of, shipped
from calm_ray.recipes.merge import split_words


@pytest.mark.parametrize(
    "words",
    [
        [str(DEMO_RECIPE), "rounds=7", "--dry-run"],
        [str(DEMO_RECIPE), "--dry-run", "rounds=7"],
        ["--dry-run", "rounds=7", str(DEMO_RECIPE)],
        ["rounds=7", "--dry-run", "seed=0"],
    ],
)
def test_overrides_may_stand_on_both_sides_of_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rounds"] == 7


@pytest.mark.parametrize(
    "words",
    [["align", "--dryrun", "rounds=7"], ["stats", "run", "--json", "more"]],
)
def test_unknown_arguments_are_rejected(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_path_with_an_equals_sign_is_a_recipe(tmp_path: Path) -> None:
    path = f"{tmp_path}/lr=5e-6/recipe.yaml"
    words = ["rounds=1", path, "dco.gamma.en-fr=0.1", "dco/aya"]
    assert split_words(words) == ([path, "dco/aya"], ["rounds=1", "dco.gamma.en-fr=0.1"])


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines if line and not line.startswith("`")]
    files = {name_of(path) for path in shipped()}
    assert {name.split(":")[0] for name in starts} == files
    assert all(len(line) <= 125 for line in lines)
    assert main(["recipes", "dco/aya"]) == 0
    assert capsys.readouterr().out == (RECIPES / "dco" / "aya.yaml").read_text()
    assert main(["recipes", "dco/aia"]) == 2
    assert "did you mean dco/aya?" in capsys.readouterr().err


def test_shipped_recipe_works_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["align", "--dry-run", "dco/demo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"] == "dco"


def test_threads_sleep_while_they_wait_unless_the_user_decides() -> None:
    code = "import calm_ray.cli, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in ({}, "PASSIVE False"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE False"):
        shown = subprocess.check_output([sys.executable, "-c", code], env={**environment, **given}, text=True)
        assert shown.strip() == expected
