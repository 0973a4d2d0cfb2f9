"""What runs of one comparison have in common: it is made once, and copied into the runs that come later.

Policies are the same where their weights are, whatever a run calls them: what `dpo_gold` ends with is what
`dpo_gold->dco` starts from.
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
    """Raises InputError where runs that have begun have other questions, or another model, than the first of them."""
    runs = [one.run for one in contenders]
    models = [(run, (run.model.name, run.model.sha256)) for run in runs if run.model is not None]
    for run, model in models:
        if model != models[0][1]:
            raise InputError(_other_than(run, models[0][0], "another model"))
    for one in contenders:
        before = next((other for other in contenders if other.config.name == one.config.init_from), None)
        if before is not None and one.run.start is not None and before.run.is_finished:
            *_, (_, last) = _policies(before)
            if one.run.start.sha256 != last.sha256:
                raise InputError(_other_than(one.run, before.run, "a start that is not the last policy"))
    for split in SPLITS:
        asked = [run for run in runs if run.questions(split).is_finished]
        for run in asked[1:]:
            if not _same_rows(run.questions(split), asked[0].questions(split)):
                raise InputError(_other_than(run, asked[0], f"other questions ({split})"))


def _other_than(run: RunDirectory, first: RunDirectory, what: str) -> str:
    return (
        f"{run.uri} has {what} than {first.uri}, so that they cannot be compared. "
        "Give the recipe another name, or add --overwrite to delete these runs and start again."
    )


def _same_rows(one: Stage, other: Stage) -> bool:
    here, there = one.manifest(), other.manifest()
    return one.chunks() == other.chunks() and all(
        here[name]["sha256"] == there[name]["sha256"] or one.read_chunk(chunk).equals(other.read_chunk(chunk))
        for chunk, name in ((chunk, f"{chunk}.parquet") for chunk in one.chunks())
    )


def share_questions(run: RunDirectory, others: Sequence[RunDirectory]) -> None:
    """Copies the questions of the first run that has them, so that all runs have the same."""
    for split in SPLITS:
        for other in others:
            _take(run.questions(split), other.questions(split))


def share_start(one: Contender, others: Sequence[Contender]) -> None:
    """Copies what another run knows of the policy that a run starts from: its answers, its scores, its samples.

    These are the rows of steps that both runs have, with the same settings, and that depend on questions and policy
    alone. Samples are those of round 1 alone: a round has its own seeds.
    """
    run, start = one.run, one.run.start or Policy()
    for other in others:
        for number, policy in _policies(other):
            if policy.sha256 != start.sha256:
                continue
            name = start.name if start.name != policy.name else None
            for step in _in_common(one.config, other.config, lambda config: config.evaluation):
                _take(run.stage(0, step.name), other.run.stage(number, step.name), name)
            if number == 0:
                for step in _in_common(one.config, other.config, lambda config: config.steps):
                    _take(run.stage(1, step.name), other.run.stage(1, step.name), name)


def _in_common(one: Config, other: Config, steps_of: Callable[[Config], Sequence[Step]]) -> list[Step]:
    """The steps by which engines answer the run's questions, and which are the same in both runs."""
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
    """The policies of a run by round, as far as it has come; 0 is what it starts from."""
    run, config = contender.run, contender.config
    if config.init_from is None or run.start is not None:
        yield 0, run.start or Policy()
    for number in run.trained_rounds():
        if number <= config.rounds:
            yield number, run.policy(number)


def _take(stage: Stage, other: Stage, policy: str | None = None) -> None:
    if not stage.is_finished and other.is_finished and not other.flawed():
        stage.copy(other, policy)
        say(f"copied: {other.storage.uri()}")
