"""`calm-ray export`: a run's policy as a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

from calm_ray.errors import InputError
from calm_ray.opened import open_run
from calm_ray.progress import say
from calm_ray.training.merging import merge


def export_policy(run: str, target: str, round_number: int | None) -> None:
    """Writes the policy of a run's round (default: its last) as a whole model into a new folder."""
    folder = Path(target).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is there already; name a folder to make")
    opened = open_run(run)
    policy, model = opened.policy(round_number), opened.model()
    if policy.kind == "adapter":
        merge(model.local_folder(), policy.local_folder(), folder)
    else:
        source = model.local_folder() if policy.kind == "base" else policy.local_folder()
        shutil.copytree(source, folder, dirs_exist_ok=True)
    say(f"{folder}: policy {policy.name} of {opened.run.uri}, for transformers and vLLM")
