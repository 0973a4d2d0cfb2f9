"""Methods from outside: what may be named, what runs, what is remembered of its source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from calm_ray.config import parse_config
from calm_ray.core.errors import InputError
from calm_ray.job.changes import changes_of
from calm_ray.job.open_run import open_run
from calm_ray.methods import METHODS
from calm_ray.methods.plugins import identity_of, method_named
from calm_ray.recipes import DEMO_RECIPE, load_config, read_recipe, validated
from calm_ray.run.directory import RunDirectory

SOURCE = """
from calm_ray.methods.calm import Calm
NOT_A_METHOD = 3
OWN = Calm()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A package of its own for each test, so that none is imported already."""
    name = f"plugin_{abs(hash(request.node.name))}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('ran')\n" if "runs" in request.node.name else "")
    (folder / "own.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_method_of_a_package_that_the_recipe_allows(package: str) -> None:
    assert type(method_named(f"{package}.own:OWN", [package])).__name__ == "Calm"


def test_nothing_runs_of_a_package_that_the_recipe_does_not_allow(package: str) -> None:
    with pytest.raises(ValueError, match=rf"^method: .* by plugins: \[{package}\] in the recipe"):
        method_named(f"{package}.own:OWN", ["another"])
    assert package not in sys.modules


def test_code_that_raises_while_it_runs_is_named(package: str) -> None:
    with pytest.raises(ValueError, match="cannot be imported: RuntimeError: ran"):
        method_named(f"{package}.own:OWN", [package])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOT_A_METHOD", "is not a calm_ray.methods.base.Method"),
        ("MISSING", "cannot be imported: AttributeError"),
    ],
)
def test_what_is_no_method_is_refused(package: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_named(f"{package}.own:{name}", [package])


def test_a_mistyped_method_is_answered_with_the_nearest(package: str) -> None:
    with pytest.raises(ValueError, match="did you mean calm"):
        method_named("clam", [package])
    assert method_named("calm", []) is METHODS["calm"]


def test_the_identity_of_a_package_is_that_of_all_its_source(package: str, tmp_path: Path) -> None:
    before = identity_of(package)
    assert before["version"] is None
    (tmp_path / package / "own.py").write_text(SOURCE + "# changed\n")
    changed = identity_of(package)
    assert changed != before
    (tmp_path / package / "own.py").write_text(SOURCE)
    assert identity_of(package) == before
    (tmp_path / package / "more.py").write_text("")
    assert identity_of(package) not in (before, changed)


@pytest.mark.parametrize("name", ["not_there", "sys", "xml.dom"])
def test_what_is_no_package_with_source_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"plugins: there is no package {name}"):
        identity_of(name)


WITH_SETTINGS = """
from calm_ray.core.sections import Section
from calm_ray.methods.calm import Calm
class Own(Section):
    needed: int
class Method(Calm):
    section, settings = {section!r}, Own
    def check(self, run, own): assert own.needed == 3
METHOD = Method()
"""


def recipe_of(package: str, **keys: Any) -> dict[str, Any]:
    return {**read_recipe(DEMO_RECIPE), "method": f"{package}.own:METHOD", "plugins": [package], **keys}


def test_a_section_of_its_own_may_have_keys_that_must_be_given(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "own.py").write_text(WITH_SETTINGS.format(section="short"))
    assert parse_config(recipe_of(package, short={"needed": 3})).own.needed == 3
    with pytest.raises(InputError, match="short: is missing"):
        validated(recipe_of(package), "recipe")
    with pytest.raises(InputError, match=r"short.neded: neded is not known; did you mean needed\?"):
        validated(recipe_of(package, short={"needed": 3, "neded": 3}), "recipe")


def test_a_section_of_its_own_may_not_hide_another(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "own.py").write_text(WITH_SETTINGS.format(section="train"))
    with pytest.raises(ValueError, match="calls its section train, which is the name of another one"):
        parse_config(recipe_of(package))


def test_a_run_does_not_allow_itself_to_run_code(package: str, tmp_path: Path) -> None:
    """Neither where it is opened nor where a recipe meets it."""
    run = RunDirectory(str(tmp_path), "demo")
    config = load_config(DEMO_RECIPE, [f"storage={tmp_path}"])
    raw = {**config.as_record(), "method": f"{package}.own:METHOD", "plugins": {package: {}}}
    run.begin(raw, {}, None)
    with pytest.raises(InputError, match=f"--plugins {package}"):
        open_run(run.uri).config  # noqa: B018
    assert changes_of(run, config) is not None
    assert open_run(run.uri).policy(None).name == "base"
    assert package not in sys.modules
