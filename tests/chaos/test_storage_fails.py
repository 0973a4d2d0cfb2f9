"""Full and read-only disks: one clear error, and the run resumes once there is space."""

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
    """A disk of 256 KB (tmpfs)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system requires root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_stops_the_run_without_losing_data(
    ray_8_cpus: None, small_disk: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(name="full", storage=str(small_disk))
    assert main(["align", str(recipe)]) == 1
    message = capsys.readouterr().err
    assert "could not be written: No space left on device" in message
    assert "rerun the same command to resume" in message
    assert "Traceback" not in message
    run = RunDirectory(str(small_disk), "full")
    before = {
        f"{name}/{chunk}": stage.storage.read(f"{chunk}.parquet")
        for name, stage in run.all_stages().items()
        for chunk in stage.chunks()
    }
    assert before
    mount("-o", "remount,size=64m", str(small_disk))
    assert main(["align", str(recipe)]) == 0
    assert len(rows_of(run.stage(1, "sample").read())) == 24 * 2 * 3
    assert before == {name: run.storage.read(f"{name}.parquet") for name in before}
    assert not [file for file in small_disk.rglob("*") if ".tmp-" in file.name]


@pytest.mark.slow
def test_read_only_disk_fails_cleanly(
    small_disk: Path, make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mount("-o", "remount,ro", str(small_disk))
    assert main(["align", str(make_recipe(name="read-only", storage=str(small_disk)))]) in (1, 2)
    message = capsys.readouterr().err
    assert "Read-only file system" in message
    assert "Traceback" not in message
