"""`calm-ray export`: writes a run's policy as a full model."""

from __future__ import annotations

import shutil
from pathlib import Path

from calm_ray.core.console import say
from calm_ray.core.safety import new_folder
from calm_ray.job.open_run import open_run
from calm_ray.run.merging import merge
from calm_ray.run.model_files import model_files, require_safetensors


def export_policy(run: str, target: str, round_number: int | None) -> None:
    """Writes the policy of a round (default: the last) as a full model into a new folder."""
    folder = new_folder(target, "export")
    opened = open_run(run)
    policy, model = opened.policy(round_number), opened.model()
    if policy.kind == "adapter":
        for source in (model.local_folder(), policy.local_folder()):
            require_safetensors(source)
        merge(model.local_folder(), policy.local_folder(), folder)
    else:
        copy_model(model.local_folder() if policy.kind == "base" else policy.local_folder(), folder)
    say(f"{folder}: policy {policy.name} of {opened.run.uri}, for transformers and vLLM")


def copy_model(source: Path, target: Path) -> None:
    """Copies a model without any code or pickles next to it. Raises InputError for an unsound model."""
    require_safetensors(source)
    target.mkdir(parents=True, exist_ok=True)
    for file in model_files(source):
        shutil.copyfile(file, target / file.name)
