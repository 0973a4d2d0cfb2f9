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


def test_world_is_determined_by_its_seed() -> None:
    assert build_world(100) == build_world(100)
    assert build_world(100) != build_world(101)


@pytest.mark.parametrize("seed", range(100, 110))
def test_barriers_never_close_a_whole_topic_or_language(seed: int) -> None:
    world = build_world(seed)
    by_topic = Counter(topic for _, topic in world.barriers)
    by_language = Counter(code for code, _ in world.barriers)
    assert set(by_topic) == set(topics())
    assert set(by_topic.values()) <= set(range(BARRED_LANGUAGES[0], BARRED_LANGUAGES[1] + 1))
    assert all(1 <= by_language[code] < len(topics()) for code in world_languages())


def test_values_are_balanced_so_guessing_does_not_help(world: World) -> None:
    for topic in topics():
        counts = Counter(world.facts[town, topic] for town in range(TOWNS))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_questions_are_parallel_and_held_out_towns_are_disjoint(world: World) -> None:
    aligned, held_out = world_questions(world)
    assert len(aligned) == ALIGNED_TOWNS * len(topics()) * len(world_languages())
    assert len(held_out) == (TOWNS - ALIGNED_TOWNS) * len(topics()) * len(world_languages())
    towns = [{row["question_id"].split("-")[1] for row in part} for part in (aligned, held_out)]
    assert not towns[0] & towns[1]
    gold: dict[str, str | None] = {}
    for row in aligned + held_out:
        assert gold.setdefault(row["question_id"], row["gold"]) == row["gold"]
        assert len(set(row["choices"])) == 4
    assert 0.2 < Counter(gold.values())["A"] / len(gold) < 0.3  # always answering A is no better than chance


def test_tokenizer_round_trips_prompts(world: World) -> None:
    tokenizer = build_tokenizer(world)
    aligned, _ = world_questions(world)
    for row in aligned[:40]:
        text = prompt_text(row, "choices")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_each_name_and_value_is_one_token(world: World) -> None:
    tokenizer = build_tokenizer(world)
    for code in world_languages():
        space = "" if code == "zh" else " "
        for topic in lexicon()["topics"].values():
            assert all(len(tokenizer.encode(space + value)) == 1 for value in topic["values"][code])
        assert all(len(tokenizer.encode(space + world.name(town, code))) == 1 for town in range(TOWNS))


def test_translator_is_exact_for_every_language_pair(world: World) -> None:
    translator = WorldTranslator(world)
    options = [4, 1, 7, 2]
    for source in world_languages():
        for target in world_languages():
            for topic in topics():
                text = world.answer(11, topic, 7, options, source)
                translated = translator.translate([Passage(text, source, target, "C", "ABCD")])
                assert translated == [world.answer(11, topic, 7, options, target)]
                assert extract_answer(str(translated[0]), target, "ABCD") == "C"


@pytest.mark.parametrize("text", ["", "Answer: B", "Explanation: The merchants of Nowhere sold: salt.\nAnswer: B"])
def test_text_not_in_the_world_form_is_not_translated(world: World, text: str) -> None:
    assert WorldTranslator(world).translate([Passage(text, "en", "fr", "B", "ABCD")]) == [None]
