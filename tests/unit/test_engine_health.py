"""What the pool knows of its engines: signs of life, starts, and how long one is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factories import completion, question
from ray.exceptions import ActorUnavailableError, RayActorError

from calm_ray.core.rows import Completion, Question, rows_of, table
from calm_ray.engines.actor import _put
from calm_ray.engines.health import Patience, Pulse
from calm_ray.engines.replica import Member, is_machine_lost, none_will_start
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def member(number: int, **state: Any) -> Member:
    actor: Any = None
    return Member(number, None, actor, **state)


def test_a_pulse_that_begins_anew_learns_of_the_engines_from_their_beats() -> None:
    pulse, one = Pulse(), member(1, starts=3)
    assert one.starts_since(pulse.starts()) == 0
    pulse.beat(1, steps=7, at_work=True, is_asleep=False)
    assert pulse.ages().keys() == pulse.silence().keys() == pulse.starts().keys() == {1}
    assert one.starts_since(pulse.starts()) == 1
    pulse.started(1, "node")
    assert one.starts_since(pulse.starts()) == 2


def test_a_pulse_that_begins_anew_learns_of_the_night_from_an_engine_that_sleeps() -> None:
    pulse = Pulse()
    pulse.beat(1, steps=0, at_work=False, is_asleep=False)
    assert not pulse.is_night()
    pulse.beat(2, steps=0, at_work=False, is_asleep=True)
    assert pulse.is_night()
    pulse.set_night(False)
    pulse.beat(2, steps=0, at_work=False, is_asleep=True)  # was sent before the engine was woken
    assert not pulse.is_night()


def test_what_is_known_under_a_ticket_is_that_of_the_engine_that_has_begun() -> None:
    pulse = Pulse()
    pulse.started(1, "node")
    assert not pulse.has_begun(17)
    assert pulse.silence_under(17) is None
    assert pulse.node_under(17) is None
    pulse.begins(17, engine=1)
    pulse.started(1, "another node")
    assert pulse.node_under(17) == "node"
    silence = pulse.silence_under(17)
    assert silence is not None
    assert silence >= 0.0


@pytest.mark.parametrize(
    ("members", "starts", "over"),
    [
        ([member(1, has_failed=True), member(2)], {1: 1, 2: 1}, False),  # 2 is still loading
        ([member(1, has_failed=True), member(2)], {1: 2}, True),  # 2 waits for a place
        ([member(1, has_failed=True), member(2, has_run=True)], {1: 2, 2: 1}, False),
        ([member(1, has_failed=True), member(2, has_failed=True)], {1: 3, 2: 1}, True),
        ([member(1, has_failed=True)], {}, True),  # it failed before it could say that it begins
    ],
)
def test_one_engine_that_cannot_start_does_not_end_the_others(
    members: list[Member], starts: dict[int, int], over: bool
) -> None:
    assert none_will_start(members, starts) is over


def test_engines_that_start_are_waited_for_while_they_come() -> None:
    patience = Patience(seconds=30, late={9}, since=0.0)
    assert not patience.is_over(up=0, coming={1, 2, 3}, now=100)  # with none there is nothing to begin with
    assert not patience.is_over(up=1, coming={2, 3}, now=100)
    assert not patience.is_over(up=2, coming={3}, now=129)
    assert not patience.is_over(up=2, coming={3}, now=159)
    assert patience.is_over(up=2, coming={3}, now=160)
    assert patience.is_over(up=3, coming=set(), now=160)
    assert Patience(seconds=30, late={9}, since=0.0).is_over(up=3, coming={9}, now=0)  # not a second time
    assert not Patience(seconds=30, late={9}, since=0.0).is_over(up=3, coming={8, 9}, now=0)


def test_a_machine_that_was_taken_back_is_lost() -> None:
    assert is_machine_lost(RayActorError(preempted=True), None)
    assert not is_machine_lost(ActorUnavailableError("out of reach", None), None)


@pytest.mark.parametrize("is_finished", [False, True])
def test_an_engine_that_comes_too_late_does_not_write_over_what_is_done(tmp_path: Path, is_finished: bool) -> None:
    questions, output = (Stage(Storage(str(tmp_path / name))) for name in ("questions", "output"))
    questions.write("00000", table(Question, [question()]))
    tasks = [ChunkTask(questions, output, "00000", code) for code in ("en", "fr")]
    _put(tasks[0], Completion, [completion("A")], tokens=2)
    if is_finished:
        output.finish({})
    assert _put(tasks[0], Completion, [completion("B")], tokens=3) == {"rows": 1, "tokens": 3}
    _put(tasks[1], Completion, [completion("C", "fr")], tokens=4)
    assert {row["answer"] for row in rows_of(output.read())} == {"A", "C"}
    assert output.counts()["tokens"] == 6
    assert output.flawed() == []
