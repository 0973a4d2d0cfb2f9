"""Repairs a resumed run: discards files that do not match their manifest, so that they are regenerated."""

from __future__ import annotations

from calm_ray.core.console import progress_bar, say
from calm_ray.run.directory import RunDirectory
from calm_ray.run.invalidation import Graph
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage


def repair(run: RunDirectory, graph: Graph) -> None:
    """Verifies every file against its manifest; logs and discards missing or corrupt ones."""
    stages = run.all_stages()
    for stage in stages.values():
        stage.recover()
    files = sum(len(stage.names()) for stage in stages.values())
    if not files:
        return
    with progress_bar("verify files", files) as progress:
        flawed = {path: stage.flawed(progress.advance) for path, stage in stages.items()}
    # Training last: with its lost policy discarded, it would look unfinished, and damaged examples restart that.
    for path, files_of in sorted(flawed.items(), key=lambda item: item[0].endswith(f"/{graph.trains}")):
        if not files_of:
            continue
        say(f"{path}: {len(files_of)} missing or corrupt file(s) ({files_of[0]})")
        number, _, folder = path.removeprefix("rounds/").partition("/")
        if folder == graph.trains:
            _repair_training(run, int(number), stages[path], files_of)
            continue
        if path.startswith("rounds/"):
            for other in graph.together(folder):  # first, so that this folder never looks complete without the others
                run.stage(int(number), other).forget(files_of)
        stages[path].forget(files_of)
        if path.startswith("rounds/") and graph.leads_to_training(folder):
            _forget_unfinished_training(run, int(number))


def _forget_unfinished_training(run: RunDirectory, number: int) -> None:
    """Restarts unfinished training whose examples are regenerated, since they may differ."""
    stage = run.training(number)
    if not stage.storage.exists("policy.json"):
        stage.storage.delete("")


def _repair_training(run: RunDirectory, number: int, stage: Stage, flawed: list[str]) -> None:
    """Has a lost policy trained again unless a later round builds on it. Other lost files are no longer needed."""
    if not stage.is_finished:
        stage.forget(flawed)
        return
    if not any(name.startswith("policy") for name in flawed):
        stage.discard_keeping_finished(flawed)
        return
    later = [n for n in run.trained_rounds() if n > number]
    if not later:
        stage.forget([*flawed, "policy.json"])
        return
    name = Policy(**stage.record["policy"]).name
    say(f"  policy {name} is lost; keeping round {later[0]}, which started from it")
    stage.discard_keeping_finished(flawed)
