from collections import Counter

import pytest

from calm_ray.demo.generator import (
    ALIGNED_TOWNS,
    BARRED_LANGUAGES,
    TOWNS,
    World,
    build_world,
    lexicon,
    topics,
    world_languages,
    world_questions,
)
from calm_ray.demo.tokenizer import build_tokenizer
from calm_ray.demo.translator import WorldTranslator
from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.passages import Passage
from calm_ray.prompts.questions import prompt_text


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(100)


def test_a_seed_is_a_world() -> None:
    assert build_world(100) == build_world(100)
    assert build_world(100) != build_world(101)


@pytest.mark.parametrize("seed", range(100, 110))
def test_barriers_leave_every_topic_to_some_language_and_every_language_some_topic(seed: int) -> None:
    world = build_world(seed)
    by_topic = Counter(topic for _, topic in world.barriers)
    by_language = Counter(code for code, _ in world.barriers)
    assert set(by_topic) == set(topics())
    assert set(by_topic.values()) <= set(range(BARRED_LANGUAGES[0], BARRED_LANGUAGES[1] + 1))
    assert all(1 <= by_language[code] < len(topics()) for code in world_languages())


def test_values_are_equally_common_so_that_guessing_gains_nothing(world: World) -> None:
    for topic in topics():
        counts = Counter(world.facts[town, topic] for town in range(TOWNS))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_questions_are_parallel_and_the_held_out_ones_are_about_other_towns(world: World) -> None:
    aligned, held_out = world_questions(world)
    assert len(aligned) == ALIGNED_TOWNS * len(topics()) * len(world_languages())
    assert len(held_out) == (TOWNS - ALIGNED_TOWNS) * len(topics()) * len(world_languages())
    towns = [{row["question_id"].split("-")[1] for row in part} for part in (aligned, held_out)]
    assert not towns[0] & towns[1]
    gold: dict[str, str | None] = {}
    for row in aligned + held_out:
        assert gold.setdefault(row["question_id"], row["gold"]) == row["gold"]
        assert len(set(row["choices"])) == 4
    assert 0.2 < Counter(gold.values())["A"] / len(gold) < 0.3  # "always the first option" is right by chance only


def test_the_tokenizer_gives_back_what_it_was_given(world: World) -> None:
    tokenizer = build_tokenizer(world)
    aligned, _ = world_questions(world)
    for row in aligned[:40]:
        text = prompt_text(row, instruction=False)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_names_and_values_are_one_token_each(world: World) -> None:
    tokenizer = build_tokenizer(world)
    for code in world_languages():
        space = "" if code == "zh" else " "
        for topic in lexicon()["topics"].values():
            assert all(len(tokenizer.encode(space + value)) == 1 for value in topic["values"][code])
        assert all(len(tokenizer.encode(space + world.name(town, code))) == 1 for town in range(TOWNS))


def test_the_translator_is_exact_between_all_languages(world: World) -> None:
    translator = WorldTranslator(world)
    options = [4, 1, 7, 2]
    for source in world_languages():
        for target in world_languages():
            for topic in topics():
                text = world.answer(11, topic, 7, options, source)
                carried = translator.carry([Passage(text, source, target, "C", "ABCD")])
                assert carried == [world.answer(11, topic, 7, options, target)]
                assert extract_answer(str(carried[0]), target, "ABCD") == "C"


@pytest.mark.parametrize("text", ["", "Answer: B", "Explanation: The merchants of Nowhere sold: salt.\nAnswer: B"])
def test_what_is_not_of_the_worlds_form_cannot_be_carried(world: World, text: str) -> None:
    assert WorldTranslator(world).carry([Passage(text, "en", "fr", "B", "ABCD")]) == [None]
