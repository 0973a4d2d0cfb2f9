"""Methods from plug-ins: which may be loaded, when their code runs, and how their source is fingerprinted."""

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
from calm_ray.methods.plugins import load_method, package_fingerprint
from calm_ray.recipes.files import DEMO_RECIPE
from calm_ray.recipes.load import load_config, validated
from calm_ray.recipes.merge import read_recipe
from calm_ray.run.directory import RunDirectory

SOURCE = """
from calm_ray.methods.calm import Calm
NOT_A_METHOD = 3
OWN = Calm()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new package for each test, so that none is imported yet. Raises on import if "runs" is in the test's name."""
    name = f"plugin_{abs(hash(request.node.name))}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('ran')\n" if "runs" in request.node.name else "")
    (folder / "own.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_method_of_an_allowed_package_is_loaded(package: str) -> None:
    assert type(load_method(f"{package}.own:OWN", [package])).__name__ == "Calm"


def test_nothing_runs_in_a_package_that_is_not_allowed(package: str) -> None:
    with pytest.raises(ValueError, match=rf"^method: .* allow it with plugins: \[{package}\] in the recipe"):
        load_method(f"{package}.own:OWN", ["another"])
    assert package not in sys.modules


def test_package_that_raises_when_it_runs_is_reported(package: str) -> None:
    with pytest.raises(ValueError, match="cannot be imported: RuntimeError: ran"):
        load_method(f"{package}.own:OWN", [package])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NOT_A_METHOD", "is not a calm_ray.methods.base.Method"),
        ("MISSING", "cannot be imported: AttributeError"),
    ],
)
def test_object_that_is_not_a_method_is_rejected(package: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_method(f"{package}.own:{name}", [package])


def test_mistyped_method_gets_a_suggestion(package: str) -> None:
    with pytest.raises(ValueError, match="did you mean calm"):
        load_method("clam", [package])
    assert load_method("calm", []) is METHODS["calm"]


def test_package_fingerprint_covers_all_its_source(package: str, tmp_path: Path) -> None:
    before = package_fingerprint(package)
    assert before["version"] is None
    (tmp_path / package / "own.py").write_text(SOURCE + "# changed\n")
    changed = package_fingerprint(package)
    assert changed != before
    (tmp_path / package / "own.py").write_text(SOURCE)
    assert package_fingerprint(package) == before
    (tmp_path / package / "more.py").write_text("")
    assert package_fingerprint(package) not in (before, changed)


@pytest.mark.parametrize("name", ["not_there", "sys", "xml.dom"])
def test_package_without_source_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=f"plugins: package {name} not found"):
        package_fingerprint(name)


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


def test_plugin_section_may_have_required_keys(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "own.py").write_text(WITH_SETTINGS.format(section="short"))
    assert parse_config(recipe_of(package, short={"needed": 3})).own.needed == 3
    with pytest.raises(InputError, match="short: is missing"):
        validated(recipe_of(package), "recipe")
    with pytest.raises(InputError, match=r"short.neded: neded is not known; did you mean needed\?"):
        validated(recipe_of(package, short={"needed": 3, "neded": 3}), "recipe")


def test_plugin_section_may_not_shadow_another(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "own.py").write_text(WITH_SETTINGS.format(section="train"))
    with pytest.raises(ValueError, match="names its section train, which is already taken"):
        parse_config(recipe_of(package))


def test_run_cannot_allow_its_own_plugins(package: str, tmp_path: Path) -> None:
    """Neither when it is opened nor when it is compared with a recipe."""
    run = RunDirectory(str(tmp_path), "demo")
    config = load_config(DEMO_RECIPE, [f"storage={tmp_path}"])
    raw = {**config.as_record(), "method": f"{package}.own:METHOD", "plugins": {package: {}}}
    run.begin(raw, {}, None)
    with pytest.raises(InputError, match=f"--plugins {package}"):
        open_run(run.uri).config  # noqa: B018
    assert changes_of(run, config) is not None
    assert open_run(run.uri).policy(None).name == "base"
    assert package not in sys.modules
