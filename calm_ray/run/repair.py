"""Repairs a resumed run: verifies every file against its manifest and discards corrupt ones, to be made again."""

from __future__ import annotations

from calm_ray.core.console import progress_bar, say
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Graph
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage


def repair(run: RunDirectory, graph: Graph) -> None:
    """Takes out of the run's manifests what is not as it was written, and says so; whole files are left alone."""
    stages = run.all_stages()
    for stage in stages.values():
        stage.recover()
    files = sum(len(stage.names()) for stage in stages.values())
    if not files:
        return
    with progress_bar("check what is there", files) as progress:
        flawed = {path: stage.flawed(progress.advance) for path, stage in stages.items()}
    for path, files_of in flawed.items():
        if not files_of:
            continue
        say(f"{path}: {len(files_of)} files are gone or not what was written ({files_of[0]})")
        number, _, folder = path.removeprefix("rounds/").partition("/")
        if folder == graph.trains:
            _repair_training(run, int(number), stages[path], files_of)
            continue
        if path.startswith("rounds/"):
            for other in graph.together(folder):  # first, so that none ever seems to be whole without the others
                run.stage(int(number), other).forget(files_of)
        stages[path].forget(files_of)
        if path.startswith("rounds/") and graph.leads_to_training(folder):
            _forget_begun_training(run, int(number))


def _forget_begun_training(run: RunDirectory, number: int) -> None:
    """A training that had begun on examples that are made again, and may come out otherwise, begins again."""
    stage = run.training(number)
    if not stage.storage.exists("policy.json"):
        stage.storage.delete("")


def _repair_training(run: RunDirectory, number: int, stage: Stage, flawed: list[str]) -> None:
    """A lost policy is trained again, if nothing came after it; what led to it is not needed any more."""
    if not stage.is_finished:
        stage.forget(flawed)
        return
    if not any(name.startswith("policy") for name in flawed):
        stage.do_without(flawed)
        return
    later = [n for n in run.trained_rounds() if n > number]
    if not later:
        stage.forget([*flawed, "policy.json"])
        return
    name = Policy(**stage.record["policy"]).name
    say(f"  policy {name} is lost; round {later[0]} has started from it, and stays")
    stage.do_without(flawed)
