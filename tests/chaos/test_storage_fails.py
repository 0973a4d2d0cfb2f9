"""A disk that fills up, and one that takes nothing: one clear error, and the run goes on once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calm_ray.cli import main
from calm_ray.core.rows import rows_of
from calm_ray.run.directory import RunDirectory


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_one_error_and_loses_nothing(
    ray_8_cpus: None, small_disk: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(name="full", storage=str(small_disk))
    assert main(["align", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "could not be written: No space left on device" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    run = RunDirectory(str(small_disk), "full")
    there = {name: stage.chunks() for name, stage in run.all_stages().items()}
    assert any(there.values())
    before = {
        f"{name}/{chunk}": stage.storage.read(f"{chunk}.parquet")
        for name, stage in run.all_stages().items()
        for chunk in stage.chunks()
    }
    mount("-o", "remount,size=64m", str(small_disk))
    assert main(["align", str(recipe)]) == 0
    assert len(rows_of(run.stage(1, "sample").read())) == 24 * 2 * 3
    assert before == {name: run.storage.read(f"{name}.parquet") for name in before}
    assert not [file for file in small_disk.rglob("*") if ".tmp-" in file.name]


def test_a_disk_that_takes_nothing_is_refused_before_anything_starts(
    small_disk: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mount("-o", "remount,ro", str(small_disk))
    assert main(["align", str(make_recipe(name="read-only", storage=str(small_disk)))]) in (1, 2)
    said = capsys.readouterr().err
    assert "Read-only file system" in said
    assert "Traceback" not in said
