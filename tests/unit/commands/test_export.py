"""Folders that an export refuses, before it reads the run."""

from pathlib import Path

import pytest

from calm_ray.commands.export import export_policy
from calm_ray.core.errors import InputError


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "folder"])
def test_export_overwrites_nothing(is_file: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    file = target if is_file else target / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(InputError, match="already exists"):
        export_policy(str(tmp_path / "no-run"), str(target), None)
    assert file.read_text() == "{}"
