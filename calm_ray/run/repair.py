"""A run that is gone on with: what it holds is compared with its manifests, and what is torn or gone is made again."""

from __future__ import annotations

from calm_ray.core.console import progress_bar, say
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import follows
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage

TOGETHER = {"votes": "pairs"}
"""Chunks that are written together with those of another stage."""


def mend(run: RunDirectory) -> None:
    """Takes out of the run's manifests what is not as it was written, and says so; whole files are left alone."""
    stages = run.all_stages()
    for stage in stages.values():
        stage.recover()
    files = sum(len(stage.names()) for stage in stages.values())
    if not files:
        return
    with progress_bar("check what is there", files) as progress:
        flawed = {name: stage.flawed(progress.advance) for name, stage in stages.items()}
    for name, files_of in flawed.items():
        if not files_of:
            continue
        say(f"{name}: {len(files_of)} files are gone or not what was written ({files_of[0]})")
        number, _, part = name.removeprefix("rounds/").partition("/")
        if part == "train":
            _mend_training(run, int(number), stages[name], files_of)
            continue
        if part in TOGETHER:  # first, so that it never seems to be whole without the other
            run.stage(int(number), TOGETHER[part]).forget(files_of)
        stages[name].forget(files_of)
        if name.startswith("rounds/") and not follows(part, "train"):
            _forget_begun_training(run, int(number))


def _forget_begun_training(run: RunDirectory, number: int) -> None:
    """A training that had begun on pairs that are made again, and may come out otherwise, begins again."""
    stage = run.stage(number, "train")
    if not stage.storage.exists("policy.json"):
        stage.storage.delete("")


def _mend_training(run: RunDirectory, number: int, stage: Stage, flawed: list[str]) -> None:
    """A lost policy is trained again, if nothing came after it; what led to it is not needed any more."""
    if not stage.is_finished:
        stage.forget(flawed)
        return
    if not any(name.startswith("policy") for name in flawed):
        stage.do_without(flawed)
        return
    later = [n for n, name in run.stages() if n > number and name == "train" and run.stage(n, name).is_finished]
    if not later:
        stage.forget([*flawed, "policy.json"])
        return
    name = Policy(**stage.record["policy"]).name
    say(f"  policy {name} is lost; round {later[0]} has gone on from it, and stays")
    stage.do_without(flawed)
