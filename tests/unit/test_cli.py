"""The words of a command."""

from pathlib import Path

import pytest
import yaml

from calm_ray.cli import main
from calm_ray.core.errors import InputError
from calm_ray.recipes import DEMO_RECIPE, recipe_and_overrides


@pytest.mark.parametrize(
    "words",
    [
        [str(DEMO_RECIPE), "rounds=7", "--dry-run"],
        [str(DEMO_RECIPE), "--dry-run", "rounds=7"],
        ["--dry-run", "rounds=7", str(DEMO_RECIPE)],
        ["rounds=7", "--dry-run", "seed=0"],
    ],
)
def test_overrides_may_stand_on_both_sides_of_an_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rounds"] == 7


@pytest.mark.parametrize(
    "words",
    [["align", "--dryrun", "rounds=7"], ["stats", "run", "--json", "more"]],
)
def test_what_no_command_takes_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_path_with_an_equals_sign_is_a_recipe(tmp_path: Path) -> None:
    path = f"{tmp_path}/lr=5e-6/recipe.yaml"
    assert recipe_and_overrides(["rounds=1", path, "dco.gamma.en-fr=0.1"]) == (
        path,
        ["rounds=1", "dco.gamma.en-fr=0.1"],
    )
    with pytest.raises(InputError, match="one recipe at a time"):
        recipe_and_overrides([path, "other.yaml"])
