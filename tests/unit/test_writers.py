"""Which engine writes what, what is tried again, and what is left without a reply."""

from __future__ import annotations

from collections import Counter

import pytest

from calm_ray.engines.text_service import RETRY_SECONDS, TRIES_ALONE, Batch, BatchQueue
from calm_ray.methods.translation import ModelTranslator
from calm_ray.prompts.passages import Passage


def deaths_until_nothing_is_left(batch: Batch, poison: int) -> Counter[int]:
    """How many engines die under batches of each size, where `poison` ends all of them."""
    deaths: Counter[int] = Counter()
    batches = [batch]
    while batches:
        one = batches.pop()
        if poison in one.numbers:
            deaths[len(one.numbers)] += 1
            batches += one.again()
    return deaths


def test_a_message_by_itself_is_given_up_only_after_several_engines() -> None:
    assert deaths_until_nothing_is_left(Batch((0,)), poison=0) == {1: TRIES_ALONE}
    assert TRIES_ALONE > 2
    assert deaths_until_nothing_is_left(Batch(tuple(range(8))), poison=5) == {8: 2, 4: 2, 2: 2, 1: TRIES_ALONE}


@pytest.mark.parametrize(("messages", "engines"), [(0, 3), (1, 3), (7, 3), (64, 1), (1000, 3), (4096, 64)])
def test_every_message_is_given_once_and_all_engines_have_some(messages: int, engines: int) -> None:
    desk = BatchQueue(messages, engines)
    given, busy = [], []
    while desk.batches:
        while (job := desk.next(now=0.0)) is not None:
            given.append(job)
            busy.append(job[1])
        assert len(busy) == len(set(busy)) <= engines
        for engine in busy:
            desk.written(engine, now=0.0)
        busy.clear()
    assert sorted(number for batch, _ in given for number in batch.numbers) == list(range(messages))
    assert all(1 <= len(batch.numbers) <= 64 for batch, _ in given)
    assert len({engine for _, engine in given}) == min(messages, engines)


def test_what_no_engine_has_begun_is_tried_for_ever_and_the_engine_rests() -> None:
    """As where engines are just being started, or their machine was lost."""
    desk, now = BatchQueue(messages=1, engines=1), 0.0
    for _ in range(10 * TRIES_ALONE):
        job = desk.next(now)
        assert job is not None
        batch, engine = job
        assert batch.deaths == 0
        desk.requeue(batch, engine, now)
        assert desk.next(now) is None
        now += RETRY_SECONDS
    for _ in range(TRIES_ALONE):
        job = desk.next(now)
        assert job is not None
        desk.died(*job, now)
        now += RETRY_SECONDS
    assert not desk.batches


def test_a_passage_without_a_reply_is_not_carried_over() -> None:
    passages = [Passage(text, "en", "fr", None, "AB") for text in ("one", "two", "three")]
    replies = ["un", None, ""]
    assert ModelTranslator(lambda messages: replies).carry(passages) == ["un", None, None]
