"""The generated documentation is up to date, every key is described, and documented commands work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import calm_ray_commands, commands, reads_a_run, recipes, starts_a_run

from calm_ray.cli import main
from calm_ray.config import config_class
from calm_ray.core.sections import Section
from calm_ray.recipes.load import load_config

ROOT = Path(__file__).parents[2]


def test_key_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """After changing a section, run: calm-ray keys > docs/configuration.md"""
    assert main(["keys"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()


def sections_of(section: type[Section]) -> list[type[Section]]:
    kinds = [kind for field in section.model_fields.values() for kind in (field.annotation, *type_arguments(field))]
    below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return [section, *(each for kind in below for each in sections_of(kind))]


def type_arguments(field: object) -> tuple[object, ...]:
    return tuple(getattr(getattr(field, "annotation", None), "__args__", ()))


def test_every_key_has_a_description() -> None:
    sections = sections_of(config_class({}))
    assert len(sections) > 8
    self_explanatory = {"world", "questions", "sampling", "engines", "train", "lora", "preferences", "dco"}
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and name not in self_explanatory
    ]
    assert missing == []
    assert [section.__name__ for section in sections if not section.__doc__] == []


@pytest.mark.parametrize("words", [words for words in calm_ray_commands() if not reads_a_run(words)], ids=" ".join)
def test_documented_command_works(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that would start a run are only checked; tests/cluster/test_documented_commands.py runs the demos."""
    monkeypatch.chdir(ROOT)
    arguments = [*words, "--dry-run"] if starts_a_run(words) else words
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    else:
        assert main(arguments) == 0


def test_other_documented_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands():
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] in ("python", "pytest"):
            assert all((ROOT / word).exists() for word in words if "/" in word), words


def test_documented_recipes_are_valid(tmp_path: Path) -> None:
    assert len(recipes()) >= 3
    for text in recipes():
        (tmp_path / "recipe.yaml").write_text(text)
        assert load_config(tmp_path / "recipe.yaml").name
