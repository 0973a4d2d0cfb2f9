"""Engine health: heartbeats, starts, and how long to wait for engines to come up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factories import completion, question
from ray.exceptions import ActorUnavailableError, RayActorError

from calm_ray.core.rows import Completion, Question, rows_of, table
from calm_ray.engines.health import Heartbeats, Patience
from calm_ray.engines.replica import Replica, all_failed_to_start, is_node_lost
from calm_ray.engines.requests import Served
from calm_ray.engines.tasks import ChunkTask
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage


def replica(number: int, **state: Any) -> Replica:
    engine: Any = None
    return Replica(number, None, engine, **state)


def test_restarted_heartbeats_relearn_engines_from_their_beats() -> None:
    heartbeats, one = Heartbeats(), replica(1, starts=3)
    assert one.starts_since(heartbeats.starts()) == 0
    heartbeats.beat(1, steps=7, at_work=True, is_asleep=False)
    assert heartbeats.ages().keys() == heartbeats.silence().keys() == heartbeats.starts().keys() == {1}
    assert one.starts_since(heartbeats.starts()) == 1
    heartbeats.started(1, "node")
    assert one.starts_since(heartbeats.starts()) == 2


def test_restarted_heartbeats_relearn_the_pause_from_a_sleeping_engine() -> None:
    heartbeats = Heartbeats()
    heartbeats.beat(1, steps=0, at_work=False, is_asleep=False)
    assert not heartbeats.is_paused()
    heartbeats.beat(2, steps=0, at_work=False, is_asleep=True)
    assert heartbeats.is_paused()
    heartbeats.set_paused(False)
    heartbeats.beat(2, steps=0, at_work=False, is_asleep=True)  # sent before the engine was woken
    assert not heartbeats.is_paused()


def test_ticket_reports_the_engine_that_started_on_it() -> None:
    heartbeats = Heartbeats()
    heartbeats.started(1, "node")
    assert not heartbeats.has_started(17)
    assert heartbeats.silence_of_ticket(17) is None
    assert heartbeats.node_of_ticket(17) is None
    heartbeats.begins(17, engine=1)
    heartbeats.started(1, "another node")
    assert heartbeats.node_of_ticket(17) == "node"
    silence = heartbeats.silence_of_ticket(17)
    assert silence is not None
    assert silence >= 0.0


@pytest.mark.parametrize(
    ("replicas", "starts", "expected"),
    [
        ([replica(1, has_failed=True), replica(2)], {1: 1, 2: 1}, False),  # 2 is still loading
        ([replica(1, has_failed=True), replica(2)], {1: 2}, True),  # 2 waits for a slot
        ([replica(1, has_failed=True), replica(2, has_run=True)], {1: 2, 2: 1}, False),
        ([replica(1, has_failed=True), replica(2, has_failed=True)], {1: 3, 2: 1}, True),
        ([replica(1, has_failed=True)], {}, True),  # failed before it could report its start
    ],
)
def test_pool_fails_only_if_every_started_engine_failed(
    replicas: list[Replica], starts: dict[int, int], expected: bool
) -> None:
    assert all_failed_to_start(replicas, starts) is expected


def test_patience_lasts_while_engines_keep_coming_up() -> None:
    patience = Patience(seconds=30, late={9}, since=0.0)
    assert not patience.is_over(up=0, coming={1, 2, 3}, now=100)  # nothing to start with yet
    assert not patience.is_over(up=1, coming={2, 3}, now=100)
    assert not patience.is_over(up=2, coming={3}, now=129)
    assert not patience.is_over(up=2, coming={3}, now=159)
    assert patience.is_over(up=2, coming={3}, now=160)
    assert patience.is_over(up=3, coming=set(), now=160)
    assert Patience(seconds=30, late={9}, since=0.0).is_over(up=3, coming={9}, now=0)  # not waited for again
    assert not Patience(seconds=30, late={9}, since=0.0).is_over(up=3, coming={8, 9}, now=0)


def test_preempted_node_is_lost() -> None:
    assert is_node_lost(RayActorError(preempted=True), None)
    assert not is_node_lost(ActorUnavailableError("out of reach", None), None)


@pytest.mark.parametrize("is_finished", [False, True])
def test_late_engine_does_not_overwrite_finished_chunks(tmp_path: Path, is_finished: bool) -> None:
    questions, output = (Stage(Storage(str(tmp_path / name))) for name in ("questions", "output"))
    questions.write("00000", table(Question, [question()]))
    tasks = [ChunkTask(questions, output, "00000", code) for code in ("en", "fr")]
    tasks[0].write(Served(Completion, [completion("A")], {"tokens": 2}))
    if is_finished:
        output.finish({})
    assert tasks[0].write(Served(Completion, [completion("B")], {"tokens": 3})) == {"rows": 1, "tokens": 3}
    tasks[1].write(Served(Completion, [completion("C", "fr")], {"tokens": 4}))
    assert {row["answer"] for row in rows_of(output.read())} == {"A", "C"}
    assert output.counts()["tokens"] == 6
    assert output.flawed() == []
