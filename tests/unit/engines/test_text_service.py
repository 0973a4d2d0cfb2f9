"""Which engine gets which batch, what is retried, and what is left without a reply."""

from __future__ import annotations

from collections import Counter

import pytest

from calm_ray.engines.text_service import MAX_DEATHS_ALONE, RETRY_SECONDS, Batch, BatchQueue
from calm_ray.methods.translation import ModelTranslator
from calm_ray.prompts.passages import Passage


def count_deaths(batch: Batch, poison: int) -> Counter[int]:
    """Engine deaths by batch size until no batch is left, if the message `poison` crashes every engine."""
    deaths: Counter[int] = Counter()
    batches = [batch]
    while batches:
        one = batches.pop()
        if poison in one.numbers:
            deaths[len(one.numbers)] += 1
            batches += one.again()
    return deaths


def test_single_message_is_dropped_only_after_several_deaths() -> None:
    assert count_deaths(Batch((0,)), poison=0) == {1: MAX_DEATHS_ALONE}
    assert MAX_DEATHS_ALONE > 2
    assert count_deaths(Batch(tuple(range(8))), poison=5) == {8: 2, 4: 2, 2: 2, 1: MAX_DEATHS_ALONE}


@pytest.mark.parametrize(("messages", "engines"), [(0, 3), (1, 3), (7, 3), (64, 1), (1000, 3), (4096, 64)])
def test_messages_are_assigned_once_and_across_all_engines(messages: int, engines: int) -> None:
    queue = BatchQueue(messages, engines)
    assigned, busy = [], []
    while queue.batches:
        while (job := queue.next(now=0.0)) is not None:
            assigned.append(job)
            busy.append(job[1])
        assert len(busy) == len(set(busy)) <= engines
        for engine in busy:
            queue.written(engine, now=0.0)
        busy.clear()
    assert sorted(number for batch, _ in assigned for number in batch.numbers) == list(range(messages))
    assert all(1 <= len(batch.numbers) <= 64 for batch, _ in assigned)
    assert len({engine for _, engine in assigned}) == min(messages, engines)


def test_unstarted_batch_is_retried_forever_with_pauses() -> None:
    """Such as while engines start, or after their node was lost."""
    queue, now = BatchQueue(messages=1, engines=1), 0.0
    for _ in range(10 * MAX_DEATHS_ALONE):
        job = queue.next(now)
        assert job is not None
        batch, engine = job
        assert batch.deaths == 0
        queue.requeue(batch, engine, now)
        assert queue.next(now) is None
        now += RETRY_SECONDS
    for _ in range(MAX_DEATHS_ALONE):
        job = queue.next(now)
        assert job is not None
        queue.died(*job, now)
        now += RETRY_SECONDS
    assert not queue.batches


def test_passage_without_a_reply_is_not_translated() -> None:
    passages = [Passage(text, "en", "fr", None, "AB") for text in ("one", "two", "three")]
    replies = ["un", None, ""]
    assert ModelTranslator(lambda messages: replies).translate(passages) == ["un", None, None]
