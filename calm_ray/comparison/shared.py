"""Copies work that runs of one comparison share from the run that did it into later ones.

Policies are identical if their weights are, whatever a run calls them: the last policy of `dpo_gold` is the first of
`dpo_gold->dco`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from calm_ray.comparison.contenders import Contender
from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.core.errors import InputError
from calm_ray.methods.base import Step
from calm_ray.run.directory import RunDirectory, Split
from calm_ray.run.policies import Policy
from calm_ray.run.stage import Stage

SPLITS = get_args(Split)


def check_common_start(contenders: Sequence[Contender]) -> None:
    """Raises InputError if runs that have started differ in model, questions or expected starting policy."""
    runs = [one.run for one in contenders]
    models = [(run, (run.model.name, run.model.sha256)) for run in runs if run.model is not None]
    for run, model in models:
        if model != models[0][1]:
            raise InputError(_mismatch(run, models[0][0], "their models differ"))
    for one in contenders:
        before = next((other for other in contenders if other.config.name == one.config.init_from), None)
        if before is not None and one.run.start is not None and before.run.is_finished:
            *_, (_, last) = _policies(before)
            if one.run.start.sha256 != last.sha256:
                raise InputError(
                    _mismatch(one.run, before.run, "the first does not start from the last policy of the second")
                )
    for split in SPLITS:
        started = [run for run in runs if run.questions(split).is_finished]
        for run in started[1:]:
            if not _same_rows(run.questions(split), started[0].questions(split)):
                raise InputError(_mismatch(run, started[0], f"their questions ({split}) differ"))


def _mismatch(run: RunDirectory, other: RunDirectory, reason: str) -> str:
    return (
        f"{run.uri} and {other.uri} cannot be compared: {reason}. "
        "Give the recipe another name, or add --overwrite to delete these runs and start again."
    )


def _same_rows(one: Stage, other: Stage) -> bool:
    here, there = one.manifest(), other.manifest()
    return one.chunks() == other.chunks() and all(
        here[name]["sha256"] == there[name]["sha256"] or one.read_chunk(chunk).equals(other.read_chunk(chunk))
        for chunk, name in ((chunk, f"{chunk}.parquet") for chunk in one.chunks())
    )


def share_questions(run: RunDirectory, others: Sequence[RunDirectory]) -> None:
    """Copies the questions from the first run that has them, so that all runs use the same."""
    for split in SPLITS:
        for other in others:
            _copy_if_finished(run.questions(split), other.questions(split))


def share_start(one: Contender, others: Sequence[Contender]) -> None:
    """Copies what other runs have computed for the policy that a run starts from: its answers, scores and samples.

    Copies only steps that both runs have, with the same settings, and that depend only on questions and policy. Copies
    samples only for round 1, since every round has its own seeds.
    """
    run, start = one.run, one.run.start or Policy()
    for other in others:
        for number, policy in _policies(other):
            if policy.sha256 != start.sha256:
                continue
            name = start.name if start.name != policy.name else None
            for step in _in_common(one.config, other.config, lambda config: config.evaluation):
                _copy_if_finished(run.stage(0, step.name), other.run.stage(number, step.name), name)
            if number == 0:
                for step in _in_common(one.config, other.config, lambda config: config.steps):
                    _copy_if_finished(run.stage(1, step.name), other.run.stage(1, step.name), name)


def _in_common(one: Config, other: Config, steps_of: Callable[[Config], Sequence[Step]]) -> list[Step]:
    """Returns the steps of engines on the run's questions that are identical in both runs."""
    here, there = one.model_dump(mode="json"), other.model_dump(mode="json")
    others = {step.name: step for step in steps_of(other)}
    return [
        step
        for step in steps_of(one)
        if step.asks in ("start", "trained")
        and set(step.reads) <= {"questions", "held_out"}
        and step.name in others
        and others[step.name].kind == step.kind
        and all(_value(here, key) == _value(there, key) for key in (*step.keys, *step.trained_keys))
    ]


def _value(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = config.get(word) if isinstance(config, dict) else None
    return config


def _policies(contender: Contender) -> Iterator[tuple[int, Policy]]:
    """Yields the policies of a run so far, by round; round 0 is the one it starts from."""
    run, config = contender.run, contender.config
    if config.init_from is None or run.start is not None:
        yield 0, run.start or Policy()
    for number in run.trained_rounds():
        if number <= config.rounds:
            yield number, run.policy(number)


def _copy_if_finished(stage: Stage, other: Stage, policy: str | None = None) -> None:
    if not stage.is_finished and other.is_finished and not other.flawed():
        stage.copy(other, policy)
        say(f"copied: {other.storage.uri()}")
